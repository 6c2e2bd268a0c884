"""What a task counts of the samples it writes, destination by destination, and how the tasks' counts add up."""

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

NUM_LENGTHS = 32
"""Bins of the histogram: bin k counts samples of 2^k to 2^(k+1) - 1 tokens."""
NUM_SAMPLES = 10
SAMPLE_CHARS = 1500
COUNTS = ("documents", "tokens", "trained_tokens", "bytes")


def trained_tokens(sample: dict[str, np.ndarray]) -> np.ndarray:
    """Ids that a model is trained to predict: an answer's where there is a mask, otherwise all but the opening bos."""
    if "loss_mask" in sample:
        return sample["tokens"][sample["loss_mask"] == 1]
    return sample["tokens"][1:]


@dataclass
class Tally:
    """Of one destination.

    Attributes:
        counts: `documents`, `tokens`, `trained_tokens`, `bytes` (UTF-8, of the text).
        lengths: int64 [NUM_LENGTHS], samples by their number of tokens.
        samples: (order, corpus, text) of the texts that hash lowest: the same ones for any division into tasks.
        unigrams: int64 [vocab], how often each id is a trained target; None where nobody asks.
    """

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_LENGTHS, np.int64))
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    unigrams: NDArray[np.int64] | None = None

    def add(self, corpus: str, text: str, sample: dict[str, np.ndarray]) -> None:
        """Count one sample; `text` is what it was made of."""
        trained, encoded = trained_tokens(sample), text.encode()
        added = (1, len(sample["tokens"]), len(trained), len(encoded))
        for name, value in zip(COUNTS, added, strict=True):
            self.counts[name] += value
        self.lengths[len(sample["tokens"]).bit_length() - 1] += 1
        if self.unigrams is not None:
            self.unigrams += np.bincount(trained, minlength=len(self.unigrams))
        order = xxh64_intdigest(encoded)
        if len(self.samples) < NUM_SAMPLES or order < self.samples[-1][0]:
            self.samples = _lowest([*self.samples, (order, corpus, text[:SAMPLE_CHARS])])


def _lowest(samples: Iterable[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    return heapq.nsmallest(NUM_SAMPLES, samples)


def save(tallies: dict[str, Tally], part: Path) -> None:
    """Write `part`/tally.json and `part`/unigrams.npz."""
    whole = {
        target: {"counts": tally.counts, "lengths": tally.lengths.tolist(), "samples": tally.samples}
        for target, tally in tallies.items()
    }
    (part / "tally.json").write_text(json.dumps(whole))
    unigrams = {target: tally.unigrams for target, tally in tallies.items() if tally.unigrams is not None}
    np.savez_compressed(part / "unigrams.npz", **unigrams)


def load(parts: Path) -> dict[str, Tally]:
    """Sum of what all tasks saved: destination -> tally, sorted by destination."""
    total: dict[str, Tally] = {}
    for file in sorted(parts.glob("*/tally.json")):
        with np.load(file.with_name("unigrams.npz")) as unigrams:
            for target, part in json.loads(file.read_text()).items():
                tally = total.setdefault(target, Tally())
                for name, value in part["counts"].items():
                    tally.counts[name] += value
                tally.lengths += np.array(part["lengths"])
                tally.samples = _lowest([*tally.samples, *map(tuple, part["samples"])])
                if target in unigrams:
                    tally.unigrams = unigrams[target] + (0 if tally.unigrams is None else tally.unigrams)
    return {target: total[target] for target in sorted(total)}
