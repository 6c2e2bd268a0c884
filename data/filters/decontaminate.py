"""Remove training documents that share a run of n words with a benchmark item (GPT-3's rule, n = 13).

An item of fewer than n words must occur completely, and needs at least 8 words: GPT-3's lower limit (arXiv 2005.14165,
appendix C), below which ordinary sentences would match. Shorter items, paraphrases and translations cannot be found.

Words are datatrove's normalised text (case, punctuation, diacritics, white space) split at spaces. Three things differ
from datatrove's own decontamination. Numbers keep their value: otherwise every table of numbers would match every
other. The hash of a run is computed with numpy from that of the run one word shorter, instead of joining and hashing n
words at every position. The index is one sorted array shared through the page cache, not a dictionary in every process.

Shape suffixes: W words.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import PUNCTUATION, TextNormConfig
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from core.atomic import write_json
from core.errors import DamagedData
from data.filters.mark_runs import remove_mark_runs
from data.filters.time_limit import run_limited
from data.readers.text_decoding import decode_text, split_lines

NORMALISATION = TextNormConfig(norm_numbers=False)
"""The options of datatrove's `simplify_text` that `split_words` stands for."""
_WORD = re.compile(rf"[^{re.escape(PUNCTUATION)}\s]+")
MIN_WORDS = 8
"""Smallest number of words of a benchmark item that is searched for."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Multiplier of the polynomial hash: 2^64 divided by the golden ratio, as in Fibonacci hashing."""
TABLE_BITS_PER_HASH = 4
"""Size of the look-up table: 2^4 entries for every hash of the index, so 1 look-up in 16 needs the binary search."""

HIT_PREFIX = "hit_"
"""Beginning of the counter of documents that share a run with one benchmark."""


def split_words(text: str) -> list[str]:
    """Return the words of datatrove's normalised text: lower case, without punctuation and diacritics.

    They are those of `simplify_text(text, NORMALISATION).split()`, in a fraction of the time: the text is cut where
    datatrove puts a blank, and only words that are not ASCII are decomposed.
    """
    words = _WORD.findall(remove_mark_runs(text).lower())
    if text.isascii():
        return words
    return [word for word in map(_remove_diacritics, words) if word]


def _remove_diacritics(word: str) -> str:
    if word.isascii():
        return word
    return "".join(char for char in unicodedata.normalize("NFD", word) if unicodedata.category(char) != "Mn")


def hash_words(text: str) -> NDArray[np.uint64]:
    """Return the xxh64 of every normalised word, uint64 [W]."""
    words = split_words(text)
    return np.fromiter(map(xxh64_intdigest, words), dtype=np.uint64, count=len(words))


def hash_runs(words_W: NDArray[np.uint64], n: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield (length, hashes uint64 [W - length + 1]) for runs of MIN_WORDS to n words, the shortest first.

    h(w1 ... wk) = h(w1 ... wk-1) * MULTIPLIER + wk modulo 2^64.
    """
    hashes = words_W
    for length in range(1, min(n, len(words_W)) + 1):
        if length > 1:
            hashes = hashes[:-1] * MULTIPLIER + words_W[length - 1 :]
        if length >= min(MIN_WORDS, n):
            yield length, hashes


def hash_item(text: str, n: int) -> NDArray[np.uint64]:
    """Return the hashes that identify a benchmark item: its runs of n words, or the one run of all words of a shorter
    item; empty for fewer than MIN_WORDS.
    """
    longest = np.empty(0, np.uint64)
    for _, hashes in hash_runs(hash_words(text), n):
        longest = hashes
    return longest


def build_index(benchmark_texts: Path, n: int, folder: Path) -> dict[str, dict[str, int]]:
    """Write the index of the benchmark items: `hashes.npy` (uint64, sorted), `owner.npy` (uint16, same order) and
    `benchmarks.json`.

    A run that several benchmarks share belongs to the first of them.

    Args:
        benchmark_texts: jsonl of `{"benchmark": str, "text": str}`, written by eval.benchmarks.items.

    Returns:
        benchmark -> numbers of `items`, `runs` (hashes) and `too_short` items, which cannot be found; benchmarks.json
        holds the same.

    Raises:
        DamagedData: the file is no text in UTF-8, or a line has another form; names its number.
    """
    counts: dict[str, dict[str, int]] = {}
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.uint16)]
    try:
        lines = split_lines(decode_text(benchmark_texts.read_bytes()))
    except UnicodeDecodeError as error:
        raise DamagedData(f"benchmark_texts: {benchmark_texts} is no text ({error}); write the file again") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            benchmark, text = str(row["benchmark"]), row["text"]
            item = hash_item(text, n)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise DamagedData(
                f'benchmark_texts: line {number} of {benchmark_texts} is not {{"benchmark", "text"}} ({error!r}); '
                "write the file again"
            ) from error
        count = counts.setdefault(benchmark, {"items": 0, "runs": 0, "too_short": 0})
        count["items"] += 1
        count["runs"] += len(item)
        count["too_short"] += len(item) == 0
        hashes.append(item)
        owners.append(np.full(len(item), list(counts).index(benchmark), dtype=np.uint16))
    # `return_index` gives the first occurrence: a shared run stays with the benchmark that comes first.
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hashes.npy", unique)
    np.save(folder / "owner.npy", np.concatenate(owners)[first])
    # Written last: its presence says that the index is complete. A list keeps the order, which `owner.npy` counts by.
    write_json(folder / "benchmarks.json", [[name, count] for name, count in counts.items()])
    return counts


def read_benchmark_counts(folder: Path) -> dict[str, dict[str, int]]:
    """Read what `build_index` returned."""
    return dict(json.loads((folder / "benchmarks.json").read_text()))


def _map_array(path: Path) -> NDArray:
    """Return an array that shares the pages of its file, as a plain one: numpy's memmap is slow on every access."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


@dataclass
class Index:
    """The index that `build_index` wrote to `folder`; each process opens it on first use."""

    folder: Path

    @cached_property
    def hashes(self) -> NDArray[np.uint64]:
        """Sorted hashes of all runs."""
        return _map_array(self.folder / "hashes.npy")

    @cached_property
    def owner(self) -> NDArray[np.uint16]:
        """Benchmark of each hash, as a position in `names`."""
        return _map_array(self.folder / "owner.npy")

    @cached_property
    def names(self) -> list[str]:
        """Names of the benchmarks, in the order of the benchmark texts."""
        return list(read_benchmark_counts(self.folder))

    @cached_property
    def _shift(self) -> np.uint64:
        """Right shift that leaves the first bits of a hash, its position in `_table`."""
        bits = max(len(self.hashes), 1).bit_length() + TABLE_BITS_PER_HASH
        return np.uint64(64 - bits)

    @cached_property
    def _table(self) -> NDArray[np.bool_]:
        """Table that is True where some hash has these first bits; almost every run of a text is decided by it."""
        table = np.zeros(1 << (64 - int(self._shift)), np.bool_)
        table[self.hashes >> self._shift] = True
        return table

    def find_benchmarks(self, hashes: NDArray[np.uint64]) -> list[str]:
        """Return the benchmarks that own any of the hashes, in the order of their first hash."""
        candidates = hashes[self._table[hashes >> self._shift]]
        if not len(candidates):
            return []
        position = np.minimum(np.searchsorted(self.hashes, candidates), len(self.hashes) - 1)
        owners = self.owner[position[self.hashes[position] == candidates]]
        return [self.names[owner] for owner in dict.fromkeys(owners.tolist())]


class DecontaminationFilter(BaseFilter):
    """Drops a document that shares a run with a benchmark item.

    The reason is the first benchmark it shares one with; the counters `hit_<name>` count the document for each of them.
    """

    name = "decontamination"

    def __init__(self, index: Path, n: int, dropped: JsonlWriter):
        super().__init__(exclusion_writer=dropped)
        self.index = Index(index)
        self.n = n

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return True, or False and the first benchmark."""
        none: dict[str, None] = {}
        benchmarks = run_limited(doc, self.name, partial(self._find_benchmarks, doc.text), otherwise=none)
        for benchmark in benchmarks:
            self.stat_update(f"{HIT_PREFIX}{benchmark}")
        return (False, next(iter(benchmarks))) if benchmarks else True

    def _find_benchmarks(self, text: str) -> dict[str, None]:
        """Return the benchmarks that the text shares a run with, as keys, those with the shortest runs first."""
        benchmarks: dict[str, None] = {}
        for _, hashes in hash_runs(hash_words(text), self.n):
            benchmarks.update(dict.fromkeys(self.index.find_benchmarks(hashes)))
        return benchmarks
