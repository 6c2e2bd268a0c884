"""Removal of training documents that share a run of n words with a benchmark item (GPT-3's rule, n = 13).

An item of fewer than n words is looked for whole, down to 8 words: GPT-3's lower limit (arXiv 2005.14165, appendix C),
below which ordinary sentences would match. Shorter items, paraphrases and translations cannot be found.

Words are datatrove's normalised text (case, punctuation, diacritics, white space) split at spaces. Unlike datatrove's
own decontamination, numbers keep their value, or every table of numbers would match every other; a run's hash is
rolled on from that of the run one word shorter, in numpy, instead of joining and hashing n words at every place; and
the index is one sorted array shared through the page cache, not a dictionary in every process.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import TextNormConfig, simplify_text
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from core.errors import RefusedInput
from data.files import write_json

NORMALISATION = TextNormConfig(norm_numbers=False)
MIN_WORDS = 8
"""Items of fewer words are not looked for."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
TABLE_BITS_PER_HASH = 4
"""2^4 places of the first look-up for every hash of the index: 1 in 16 needs the second, a binary search."""


def word_hashes(text: str) -> NDArray[np.uint64]:
    """xxh64 of every normalised word. Returns uint64 [words]."""
    words = simplify_text(text, NORMALISATION).split()
    return np.fromiter(map(xxh64_intdigest, words), dtype=np.uint64, count=len(words))


def run_hashes(words_W: NDArray[np.uint64], n: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """(length, hashes uint64 [W - length + 1]) of all runs of MIN_WORDS ... n words that fit, shortest first.

    h(w1 ... wk) = h(w1 ... wk-1) * MULTIPLIER + wk modulo 2^64.
    """
    hashes = words_W
    for length in range(1, min(n, len(words_W)) + 1):
        if length > 1:
            hashes = hashes[:-1] * MULTIPLIER + words_W[length - 1 :]
        if length >= min(MIN_WORDS, n):
            yield length, hashes


def item_hashes(text: str, n: int) -> NDArray[np.uint64]:
    """What identifies a benchmark item: its runs of n words, or all of a shorter one; empty below MIN_WORDS."""
    longest = np.empty(0, np.uint64)
    for _, hashes in run_hashes(word_hashes(text), n):
        longest = hashes
    return longest


def build_index(benchmark_texts: Path, n: int, folder: Path) -> dict[str, dict[str, int]]:
    """Index the benchmark items: `hashes.npy` (uint64, sorted), `owner.npy` (uint16, same order), `benchmarks.json`.

    A run that several benchmarks share belongs to the first of them.

    Args:
        benchmark_texts: jsonl of `{"benchmark": str, "text": str}`.
    Returns:
        benchmark -> `items`, `runs` (hashes) and `too_short` (items that cannot be found); what benchmarks.json holds.
    Raises:
        RefusedInput: a line is not of that form (its number is named).
    """
    counts: dict[str, dict[str, int]] = {}
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint16)]
    with benchmark_texts.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                benchmark, text = str(row["benchmark"]), row["text"]
                found = item_hashes(text, n)
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise RefusedInput(
                    f'benchmark_texts: line {number} of {benchmark_texts} is not {{"benchmark", "text"}} ({error!r}); '
                    "write the file again"
                ) from error
            count = counts.setdefault(benchmark, {"items": 0, "runs": 0, "too_short": 0})
            count["items"] += 1
            count["runs"] += len(found)
            count["too_short"] += len(found) == 0
            hashes.append(found)
            owners.append(np.full(len(found), list(counts).index(benchmark), dtype=np.uint16))
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hashes.npy", unique)
    np.save(folder / "owner.npy", np.concatenate(owners)[first])
    write_json(folder / "benchmarks.json", [[name, count] for name, count in counts.items()])
    return counts


def benchmark_counts(folder: Path) -> dict[str, dict[str, int]]:
    """What `build_index` returned."""
    return dict(json.loads((folder / "benchmarks.json").read_text()))


@dataclass
class Index:
    """The benchmarks' hashes, opened by a process on first use."""

    folder: Path

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        return np.load(self.folder / "hashes.npy", mmap_mode="r")

    @cached_property
    def owner(self) -> NDArray[np.uint16]:
        return np.load(self.folder / "owner.npy", mmap_mode="r")

    @cached_property
    def names(self) -> list[str]:
        return list(benchmark_counts(self.folder))

    @cached_property
    def _shift(self) -> np.uint64:
        bits = max(len(self.hashes), 1).bit_length() + TABLE_BITS_PER_HASH
        return np.uint64(64 - bits)

    @cached_property
    def _table(self) -> NDArray[np.bool_]:
        """True where some hash has these first bits: almost no word of a text gets further."""
        table = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        table[self.hashes >> self._shift] = True
        return table

    def benchmarks_of(self, hashes: NDArray[np.uint64]) -> list[str]:
        """Benchmarks that own any of the hashes, in the order of their first."""
        candidates = hashes[self._table[hashes >> self._shift]]
        if not len(candidates):
            return []
        position = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        owners = self.owner[position[self.hashes[position] == candidates]]
        return [self.names[owner] for owner in dict.fromkeys(owners.tolist())]


class DecontaminationFilter(BaseFilter):
    """Drops a document that shares a run with an item; the reason is the first benchmark, `hit_<name>` counts all."""

    name = "decontamination"

    def __init__(self, index: Path, n: int, dropped: JsonlWriter):
        super().__init__(exclusion_writer=dropped)
        self.index = Index(index)
        self.n = n

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        found: dict[str, None] = {}
        for _, hashes in run_hashes(word_hashes(doc.text), self.n):
            found.update(dict.fromkeys(self.index.benchmarks_of(hashes)))
        for benchmark in found:
            self.stat_update(f"hit_{benchmark}")
        return (False, next(iter(found))) if found else True
