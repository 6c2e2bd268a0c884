"""datatrove's GopherRepetitionFilter with its n-grams as numbers: the same verdicts, a fraction of the time.

datatrove joins the words of every n-gram of nine lengths into strings. Here words become 64-bit hashes, an n-gram's
hash rolls on from that of the n-gram one word shorter, numpy counts, and lengths come from cumulative sums.
"""

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.pipeline.filters.gopher_repetition_filter import find_duplicates
from datatrove.utils.text import split_into_words
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class RepetitionFilter(GopherRepetitionFilter):
    """Limits and reasons are datatrove's (Gopher, arXiv 2112.11446, table A1)."""

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self._lines(doc.text) or self._n_grams(doc.text) or True

    def _lines(self, text: str) -> tuple[bool, str] | None:
        """Repeated paragraphs and lines, by number and by characters."""
        for unit, parts, by_number, by_chars in (
            ("para", self.paragraph_exp.split(text.strip()), self.dup_para_frac, self.dup_para_char_frac),
            ("line", self._line_splitter.split(text), self.dup_line_frac, self.dup_line_char_frac),
        ):
            number, chars = find_duplicates(parts)
            if by_number and number / len(parts) > by_number:
                return False, f"dup_{unit}_frac"
            if by_chars and chars / len(text) > by_chars:
                return False, f"dup_{unit}_char_frac"
        return None

    def _n_grams(self, text: str) -> tuple[bool, str] | None:
        """The most frequent short n-gram, and all that repeats of longer ones."""
        words = split_into_words(text, self.language)
        words_W = np.fromiter(map(xxh64_intdigest, words), np.uint64, count=len(words))
        ends = np.cumsum(np.fromiter(map(len, words), np.int64, count=len(words)))
        starts = ends - np.diff(ends, prepend=0)
        limits = {n: (limit, True) for n, limit in self.top_n_grams} | {
            n: (limit, False) for n, limit in self.dup_n_grams
        }
        hashes = words_W
        for n in range(1, max(limits, default=0) + 1):
            if n > 1:
                hashes = hashes[:-1] * MULTIPLIER + words_W[n - 1 :]
            if n > len(words):
                break
            if n not in limits:
                continue
            limit, top = limits[n]
            chars = ends[n - 1 :] - starts[: len(starts) - n + 1]
            repeated = most_frequent(hashes, chars, n) if top else all_repeated(hashes, chars, n)
            if repeated / len(text) > limit:
                return False, f"top_{n}_gram" if top else f"duplicated_{n}_n_grams"
            if not top and repeated == 0:
                break  # what does not repeat in n words does not in more
        return None


def most_frequent(hashes_N: NDArray[np.uint64], chars_N: NDArray[np.int64], n: int) -> int:
    """Characters, blanks included, of all occurrences of the most frequent n-gram; of several, the one seen first."""
    _, first, counts = np.unique(hashes_N, return_index=True, return_counts=True)
    most = counts.max()
    return int(most) * int(chars_N[first[counts == most].min()] + n - 1)


def all_repeated(hashes_N: NDArray[np.uint64], chars_N: NDArray[np.int64], n: int) -> int:
    """Characters of n-grams that were there before, none counted twice where they overlap."""
    if len(np.unique(hashes_N)) == len(hashes_N):
        return 0
    seen: set[int] = set()
    hashes, repeated, index = hashes_N.tolist(), 0, 0
    while index < len(hashes):
        if hashes[index] in seen:
            repeated += int(chars_N[index])
            index += n
        else:
            seen.add(hashes[index])
            index += 1
    return repeated
