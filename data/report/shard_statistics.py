"""Statistics of the samples that a task writes, by destination, and their sum over all tasks.

A destination is a folder of shards, for example `shards/pretrain/web`.
"""

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

NUM_LENGTHS = 32
"""Number of bins of the histogram of lengths: bin k counts samples of 2^k to 2^(k+1) - 1 tokens."""
NUM_SAMPLES = 10
"""Number of sample texts of each destination on the statistics page."""
SAMPLE_CHARS = 1500
COUNTS = ("documents", "tokens", "trained_tokens", "bytes")


def select_trained_tokens(sample: dict[str, np.ndarray]) -> np.ndarray:
    """Return the ids that a model is trained to predict: of a conversation those with mask 1, of a text all but bos."""
    if "loss_mask" in sample:
        return sample["tokens"][sample["loss_mask"] == 1]
    return sample["tokens"][1:]


@dataclass
class ShardStatistics:
    """Statistics of one destination.

    Attributes:
        counts: numbers of `documents`, `tokens`, `trained_tokens` and `bytes` (of the text, UTF-8).
        lengths: histogram of the samples' numbers of tokens, int64 [NUM_LENGTHS].
        samples: (hash, corpus, text) of the texts with the lowest hashes, which do not depend on the number of tasks.
        unigrams: number of times that each id is a trained token, int64 [vocab]; None where it is not counted.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_LENGTHS, np.int64))
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    unigrams: NDArray[np.int64] | None = None

    def add(self, corpus: str, text: str, sample: dict[str, np.ndarray]) -> None:
        """Count one sample.

        Args:
            text: the text that the sample's tokens encode.
        """
        trained, encoded = select_trained_tokens(sample), text.encode()
        added = (1, len(sample["tokens"]), len(trained), len(encoded))
        for name, value in zip(COUNTS, added, strict=True):
            self.counts[name] += value
        self.lengths[len(sample["tokens"]).bit_length() - 1] += 1
        if self.unigrams is not None:
            self.unigrams += np.bincount(trained, minlength=len(self.unigrams))
        order = xxh64_intdigest(encoded)
        if len(self.samples) < NUM_SAMPLES or order < self.samples[-1][0]:
            self.samples = _keep_lowest([*self.samples, (order, corpus, text[:SAMPLE_CHARS])])


def _keep_lowest(samples: Iterable[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    return heapq.nsmallest(NUM_SAMPLES, samples)


def save(statistics: dict[str, ShardStatistics], part: Path) -> None:
    """Write the statistics of one task, by destination, to tally.json and unigrams.npz in its folder."""
    entries = {
        target: {"counts": entry.counts, "lengths": entry.lengths.tolist(), "samples": entry.samples}
        for target, entry in statistics.items()
    }
    (part / "tally.json").write_text(json.dumps(entries))
    unigrams = {target: entry.unigrams for target, entry in statistics.items() if entry.unigrams is not None}
    np.savez_compressed(part / "unigrams.npz", **unigrams)


def load(parts: Iterable[Path]) -> dict[str, ShardStatistics]:
    """Return the sum of the statistics that were saved in the folders `parts`, sorted by destination."""
    total: dict[str, ShardStatistics] = {}
    for file in (part / "tally.json" for part in parts):
        with np.load(file.with_name("unigrams.npz")) as unigrams:
            for target, part in json.loads(file.read_text()).items():
                entry = total.setdefault(target, ShardStatistics())
                for name, value in part["counts"].items():
                    entry.counts[name] += value
                entry.lengths += np.array(part["lengths"])
                entry.samples = _keep_lowest([*entry.samples, *map(tuple, part["samples"])])
                if target in unigrams:
                    entry.unigrams = unigrams[target] + (0 if entry.unigrams is None else entry.unigrams)
    return {target: total[target] for target in sorted(total)}
