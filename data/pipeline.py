"""The data step: corpora in, tokenizer, MDS shards and manifest out.

    1 read, filter by quality      4 MinHash signatures           7 drop near duplicates, decontaminate, split
    2 find exact duplicates        5 pairs, bucket by bucket      8 train or take the tokenizer
    3 drop exact duplicates        6 clusters                     9 tokenize, write MDS

Steps 1 to 7 and 9 are datatrove pipelines. All of them resume: datatrove's markers say which ranks are done, and what
is outside datatrove (tokenizer, joined MDS folders, manifest) is written beside and renamed.
"""

import dataclasses
import gzip
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datatrove.pipeline.writers import JsonlWriter

from data import dedup, manifest, mds, tokenizer
from data.blocks import CorpusReader, RankReader, SplitTagger, rank_file
from data.check import check, estimate_bytes
from data.config import DataConfig
from data.corpora import PACKAGES, Unit, packages_needed, resolve, units
from data.decontaminate import DecontaminationFilter, build_index
from data.execution import Report, Runner
from data.files import sha256_file, write_json
from data.filters import quality_filters

__all__ = ["PACKAGES", "check", "estimate_bytes", "packages_needed", "prepare"]

log = logging.getLogger(__name__)

MANIFEST = "data_manifest.json"
OWNED = ("work", "set_aside", "tokenizer", "shards", "heldout", MANIFEST)
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
    executor: Literal["local", "ray"] = "local",
) -> dict:
    """Prepare the data of a run; call it again after an interruption and it goes on.

    Args:
        packages: distribution name -> downloaded wheel or sdist; a missing name means the registry did not answer, and
            the corpora that want it fall back or are left out, as the manifest says.
        benchmark_texts: jsonl of `{"benchmark", "text"}` whose n-grams no training document may share; None skips it.
        out: working folder, on a disk that all workers see; the caller renames it when this returns.
        report: called with (phase, done, total).
        executor: `ray` wants Ray initialised by the caller.

    Returns:
        the manifest, also written to `out/data_manifest.json` (docs/data.md explains its keys).

    Raises:
        ValueError: the config or an input is unusable, or nothing is left of a corpus.
        RuntimeError: a task failed.
    """
    check(config)
    corpora, missing = resolve(config, packages)
    for entry in missing:
        log.warning("corpus %(corpus)s: package %(package)s is missing, fallback: %(fallback)s", entry)
    if not any(corpus.kind == "text" for corpus in corpora):
        raise ValueError(
            f"data.corpora: no text corpus is left without the packages {missing}; fetch them or add another"
        )
    todo = units(corpora, packages, config.seed)
    plan = _plan(config, todo, benchmark_texts)
    out.mkdir(parents=True, exist_ok=True)
    if _resume(out, plan):
        return json.loads((out / MANIFEST).read_text())
    work = out / "work"
    runner = Runner(executor, config.workers, work / "logs", report)

    _clean(config, runner, todo, benchmark_texts, out)
    labels = [block.name for block in quality_filters()]
    flows = manifest.corpus_flow(work / "logs", work / "read", todo, labels)
    manifest.refuse_empty(flows)
    _make_tokenizer(config, todo, out, report)
    write = [
        RankReader(work / "clean"),
        mds.ShardWriter(out / "tokenizer", work / "parts", config.shard_bytes),
    ]
    runner.run("9-tokenize", write, len(todo))
    counts = manifest.token_counts(work / "parts")
    for done, target in enumerate(counts):
        mds.assemble(work / "parts", out, target)
        report("10-join", done + 1, len(counts))

    result = {
        "plan": plan,
        "tokenizer": _tokenizer_entry(out / "tokenizer"),
        "corpora": {corpus.name: manifest.provenance(corpus, packages) | flows[corpus.name] for corpus in corpora},
        "missing": missing,
        "decontamination": {
            "ngram": config.decontaminate_ngram if benchmark_texts else None,
            "benchmark_texts_sha256": plan["benchmark_texts_sha256"],
            "hits": manifest.hits_by_benchmark(flows),
        },
        **manifest.nested(counts),
        "unigram_entropy_nats": manifest.entropies(manifest.unigram_counts(work / "parts")),
    }
    write_json(out / MANIFEST, result)
    shutil.rmtree(work)
    return result


def _plan(config: DataConfig, todo: list[Unit], benchmark_texts: Path | None) -> dict:
    """What identifies the work of an `out` folder; as it reads back from JSON."""
    archives = sorted({unit.location for unit in todo if unit.location and Path(unit.location).is_file()})
    return json.loads(
        json.dumps(
            {
                "config": dataclasses.asdict(config),
                "units": [f"{unit.corpus.name}/{unit.shard}" for unit in todo],
                "packages_sha256": {Path(archive).name: sha256_file(Path(archive)) for archive in archives},
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


def _clean(config: DataConfig, runner: Runner, todo: list[Unit], benchmark_texts: Path | None, out: Path) -> None:
    """Steps 1 to 7: `work/clean/<rank>` holds what is kept, each document with its split."""
    work = out / "work"
    exact, near = work / "exact", work / "near"
    num_text = sum(unit.corpus.kind == "text" for unit in todo)
    read = [
        CorpusReader(todo, out / "set_aside" / "malformed", work / "read"),
        *quality_filters(),
        _jsonl(work / "filtered"),
        dedup.exact_signature(exact),
    ]
    runner.run("1-read-and-filter", read, len(todo))
    runner.run("2-exact-find", [dedup.exact_find(exact)], 1)
    drop_exact = [RankReader(work / "filtered"), dedup.exact_filter(exact), _jsonl(work / "distinct")]
    runner.run("3-exact-filter", drop_exact, len(todo))
    # Text units come first, so the ranks of steps 4 and 7 agree.
    runner.run("4-near-signatures", [RankReader(work / "distinct"), dedup.near_signature(near)], num_text)
    runner.run("5-near-buckets", [dedup.near_buckets(near)], dedup.MINHASH.num_buckets)
    runner.run("6-near-cluster", [dedup.near_cluster(near)], 1)
    finish = [RankReader(work / "distinct"), dedup.near_filter(near)]
    if benchmark_texts:
        index = work / "benchmarks"
        if not (index / "names.json").exists():
            build_index(benchmark_texts, config.decontaminate_ngram, index)
        dropped = _jsonl(out / "set_aside" / "contaminated")
        finish.append(DecontaminationFilter(index, config.decontaminate_ngram, dropped))
    finish += [SplitTagger(config.seed, config.heldout_fraction, config.midtrain_fraction), _jsonl(work / "clean")]
    runner.run("7-decontaminate-and-split", finish, len(todo))


def _jsonl(folder: Path) -> JsonlWriter:
    return JsonlWriter(str(folder), output_filename="${rank}.jsonl.gz")


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
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                if document["metadata"]["split"] == "pretrain" and left > 0:
                    left -= len(document["text"])
                    yield document["text"]


def _tokenizer_entry(folder: Path) -> dict:
    return {"sha256": tokenizer.sha256(folder), "vocab_size": len(tokenizer.load(folder))}
