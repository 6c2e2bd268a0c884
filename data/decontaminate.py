"""Removal of training documents that share a run of n words with a benchmark item (GPT-3's rule, n = 13).

Words are datatrove's normalised text (case, punctuation, diacritics, white space) split at spaces. Unlike datatrove's
own decontamination, numbers keep their value, or every table of numbers would match every other, and the index is one
sorted array shared through the page cache, not a dictionary in every process.

Not covered: items shorter than n words, paraphrases and translations.
"""

import json
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import TextNormConfig, simplify_text
from xxhash import xxh64_intdigest

NORMALISATION = TextNormConfig(norm_numbers=False)


def ngram_hashes(text: str, n: int) -> np.ndarray:
    """xxh64 of every run of n words. Returns uint64 [max(words - n + 1, 0)]."""
    words = simplify_text(text, NORMALISATION).split()
    runs = (" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    return np.fromiter((xxh64_intdigest(run) for run in runs), dtype=np.uint64)


def build_index(benchmark_texts: Path, n: int, folder: Path) -> None:
    """Index the benchmark items: `hashes.npy` (uint64, sorted), `owner.npy` (uint16, same order), `names.json`.

    Args:
        benchmark_texts: jsonl of `{"benchmark": str, "text": str}`.
    Raises:
        ValueError: a line is not of that form (its number is named).
    """
    names: dict[str, int] = {}
    hashes, owners = [], []
    with benchmark_texts.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                benchmark, text = str(row["benchmark"]), row["text"]
                found = ngram_hashes(text, n)
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f'benchmark_texts: line {number} of {benchmark_texts} is not {{"benchmark", "text"}} ({error!r}); '
                    "write the file again"
                ) from error
            hashes.append(found)
            owners.append(np.full(len(found), names.setdefault(benchmark, len(names)), dtype=np.uint16))
    all_hashes = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
    all_owners = np.concatenate(owners) if owners else np.empty(0, dtype=np.uint16)
    unique, first = np.unique(all_hashes, return_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "hashes.npy", unique)
    np.save(folder / "owner.npy", all_owners[first])
    (folder / "names.json").write_text(json.dumps(list(names)))


class DecontaminationFilter(BaseFilter):
    """Drops a document with any n-gram of the index; the reason names the benchmark that owns the first hit."""

    name = "decontamination"

    def __init__(self, index: Path, n: int, dropped: JsonlWriter):
        super().__init__(exclusion_writer=dropped)
        self.index = index
        self.n = n
        self._loaded: tuple[np.ndarray, np.ndarray, list[str]] | None = None

    def _load(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        if self._loaded is None:
            self._loaded = (
                np.load(self.index / "hashes.npy", mmap_mode="r"),
                np.load(self.index / "owner.npy", mmap_mode="r"),
                json.loads((self.index / "names.json").read_text()),
            )
        return self._loaded

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        hashes, owner, names = self._load()
        wanted = ngram_hashes(doc.text, self.n)
        if not len(wanted) or not len(hashes):
            return True
        position = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
        hits = np.flatnonzero(hashes[position] == wanted)
        if not len(hits):
            return True
        return False, names[owner[position[hits[0]]]]
