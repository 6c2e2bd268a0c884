"""What the data step did, from the statistics its blocks left: counts, hits, tokens, entropies."""

import importlib.metadata
import json
import platform
from collections import Counter
from pathlib import Path

import numpy as np

from core.errors import RefusedInput
from data.catalogue.corpus import Corpus, Installed, PackageFile, Unit
from data.files import sha256_file
from data.report.shard_statistics import Tally

VERSIONED = ("datatrove", "mosaicml-streaming", "tokenizers", "spacy", "fasttext-numpy2-wheel", "xxhash", "ftfy")
"""Libraries whose version can change what comes out."""


def block_statistics(logs: Path, step: str, units: list[Unit]) -> dict[str, dict[str, Counter]]:
    """datatrove's counters of one step, summed over the shards of a corpus: corpus -> block name -> counter."""
    found: dict[str, dict[str, Counter]] = {}
    for rank, unit in enumerate(units):
        blocks = found.setdefault(unit.corpus.name, {})
        for block in json.loads((logs / step / "stats" / f"{rank:05d}.json").read_text()):
            counter = blocks.setdefault(block["name"].rpartition(": ")[2], Counter())
            for key, value in block["stats"].items():
                counter[key] += value["total"] if isinstance(value, dict) else value
    return found


def flow(counter: Counter) -> dict:
    """Documents in and out of one filter, and the reasons of those it dropped."""
    reasons = {key.removeprefix("dropped_"): n for key, n in counter.items() if key.startswith("dropped_")}
    return {"in": counter["total"], "out": counter["forwarded"], "dropped": dict(sorted(reasons.items()))}


def reading(read: Path, units: list[Unit]) -> dict[str, dict]:
    """Rows read and set aside, the sha256 of what was read and the remote files it came from, for each corpus."""
    found: dict[str, dict] = {}
    for rank, unit in enumerate(units):
        part = json.loads((read / f"{rank:05d}.json").read_text())
        entry = found.setdefault(unit.corpus.name, {"read": 0, "malformed": 0, "records_sha256": [], "inputs": []})
        entry["read"] += part["read"]
        entry["malformed"] += part["malformed"]
        entry["records_sha256"].append(part["sha256"])
        entry["inputs"] += part["inputs"]
    return found


def provenance(corpus: Corpus, packages: dict[str, Path]) -> dict:
    """Where a corpus came from: package, version, file, sha256, licence."""
    source = corpus.source
    entry = {
        "domain": corpus.domain, "kind": corpus.kind, "licence": corpus.licence,
        "non_commercial": corpus.non_commercial,
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
        versions = {name: _version(name) for name in source.distributions if name != "*"}
        return entry | {"installed": versions or "all installed distributions"}
    return entry | {"address": source.address, "pattern": source.pattern}


def versions() -> dict[str, str]:
    """Of the libraries that make tokens of text."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _version(distribution: str) -> str:
    return platform.python_version() if distribution == "python" else importlib.metadata.version(distribution)


def corpus_flow(logs: Path, read: Path, units: list[Unit], filter_labels: list[str]) -> dict[str, dict]:
    """Documents through every step, corpus by corpus."""
    filtering = block_statistics(logs, "1-read-and-filter", units)
    # The keys are the names datatrove gives its last deduplication blocks.
    exact = block_statistics(logs, "3-exact-filter", units)
    final = block_statistics(logs, "7-decontaminate-and-split", units)
    flows = reading(read, units)
    for name, entry in flows.items():
        entry["filters"] = {
            label: flow(filtering[name][label]) for label in filter_labels if filtering[name][label]["dropped"]
        }
        entry["repaired"] = filtering[name].get("repair", Counter())["repaired"]
        entry["redacted"] = filtering[name].get("pii", Counter())["redacted"]
        entry["exact_duplicates"] = exact[name]["💥 exact-deduplication stage 3"]["dropped"]
        entry["near_duplicates"] = final[name]["🎯 MinHash stage 4"]["dropped"]
        decontamination = final[name].get("decontamination", Counter())
        entry["contaminated"] = flow(decontamination)["dropped"]
        entry["contamination_hits"] = {
            key.removeprefix("hit_"): n for key, n in sorted(decontamination.items()) if key.startswith("hit_")
        }
        splits = final[name]["by hash"]
        entry["splits"] = dict(splits)
        entry["kept"] = sum(splits.values())
    return flows


def conversation_lengths(logs: Path, units: list[Unit]) -> dict[str, dict[str, int]]:
    """Corpus -> conversations that lost their last turns (`shortened`) and those set aside (`too_long`)."""
    written = block_statistics(logs, "9-tokenize", units)
    return {
        name: {key: blocks.get("mds", Counter())[key] for key in ("shortened", "too_long")}
        for name, blocks in written.items()
    }


def refuse_empty(flows: dict[str, dict]) -> None:
    """Raises RefusedInput for a corpus of which nothing is left, with the counts that say why."""
    for name, entry in flows.items():
        if entry["kept"] == 0:
            dropped = {label: counts["dropped"] for label, counts in entry["filters"].items()}
            raise RefusedInput(
                f"data.corpora: nothing is left of {name!r}: {entry['read']} rows read, {entry['malformed']} malformed,"
                f" dropped by filters {dropped}, {entry['exact_duplicates']} exact and {entry['near_duplicates']} near "
                f"duplicates, contaminated {entry['contaminated']}; take it out of data.corpora or check its source"
            )


def hits_by_benchmark(flows: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Benchmark -> corpus -> documents that share a run with it; one that shares with two benchmarks is in both."""
    hits: dict[str, dict[str, int]] = {}
    for corpus, entry in flows.items():
        for benchmark, count in entry["contamination_hits"].items():
            hits.setdefault(benchmark, {})[corpus] = count
    return hits


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution of int64 counts [vocab]: the loss of the best unigram model."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def entropies(tallies: dict[str, Tally]) -> dict[str, dict[str, float]]:
    """Unigram entropy in nats a token of held-out text, held-out answers and sft answers, by domain and `overall`.

    Over the tokens a model predicts: all but the opening bos of a text, the masked tokens of a conversation.
    """
    found = {}
    for group, prefix in (
        ("heldout_text", "heldout/pretrain/"), ("heldout_sft", "heldout/sft/"), ("sft", "shards/sft/"),
    ):  # fmt: skip
        members = {key.removeprefix(prefix): t.unigrams for key, t in tallies.items() if key.startswith(prefix)}
        if members:
            found[group] = {domain: entropy(counts) for domain, counts in sorted(members.items())}
            found[group]["overall"] = entropy(sum(members.values()))
    return found


def nested(counts: dict[str, dict]) -> dict:
    """`shards/pretrain/web` -> {"shards": {"pretrain": {"web": ...}}}, and the same for heldout."""
    tree: dict = {"shards": {}, "heldout": {}}
    for target, entry in counts.items():
        top, stage, domain = target.split("/")
        tree[top].setdefault(stage, {})[domain] = entry
    return tree
