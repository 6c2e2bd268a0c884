"""datatrove's GopherRepetitionFilter with its n-grams as numbers: the same verdicts in a fraction of the time.

datatrove joins the words of every n-gram of nine lengths into strings. Here words become 64-bit hashes, and the hash
of an n-gram is computed from that of the n-gram one word shorter. numpy counts them, and lengths come from cumulative
sums.

Shape suffixes: W words, N n-grams.
"""

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from data.compat import find_duplicates, read_repetition_rules

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Multiplier of the polynomial hash: 2^64 divided by the golden ratio, as in Fibonacci hashing."""


class RepetitionFilter(GopherRepetitionFilter):
    """Drops repetitive documents; limits and reasons are datatrove's (Gopher, arXiv 2112.11446, table A1)."""

    def __init__(self, language: WordTokenizer):
        super().__init__(language=language)
        self.rules = read_repetition_rules(self)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return True, or False with the first limit that the document exceeds."""
        return self._check_lines(doc.text) or self._check_n_grams(doc.text) or True

    def _check_lines(self, text: str) -> tuple[bool, str] | None:
        """Compare repeated paragraphs and lines with their limits, by number and by characters."""
        rules = self.rules
        paragraphs = rules.paragraph_separator.split(text.strip())
        lines = rules.line_separator.split(text)
        for unit, parts, max_share, max_char_share in (
            ("para", paragraphs, rules.paragraphs, rules.paragraph_chars),
            ("line", lines, rules.lines, rules.line_chars),
        ):
            number, chars = find_duplicates(parts)
            if max_share and number / len(parts) > max_share:
                return False, f"dup_{unit}_frac"
            if max_char_share and chars / len(text) > max_char_share:
                return False, f"dup_{unit}_char_frac"
        return None

    def _check_n_grams(self, text: str) -> tuple[bool, str] | None:
        """Compare the most frequent short n-gram, and all repeated longer n-grams, with their limits."""
        words = split_into_words(text, self.language)
        words_W = np.fromiter(map(xxh64_intdigest, words), np.uint64, count=len(words))
        # Positions of the words in the text without blanks: an n-gram's length is one end minus one start.
        ends_W = np.cumsum(np.fromiter(map(len, words), np.int64, count=len(words)))
        starts_W = ends_W - np.diff(ends_W, prepend=0)
        limits = {n: (limit, True) for n, limit in self.rules.top_n_grams} | {
            n: (limit, False) for n, limit in self.rules.repeated_n_grams
        }
        hashes_N = words_W
        for n in range(1, max(limits, default=0) + 1):
            if n > 1:
                hashes_N = hashes_N[:-1] * MULTIPLIER + words_W[n - 1 :]
            if n > len(words):
                break
            if n not in limits:
                continue
            limit, top = limits[n]
            chars_N = ends_W[n - 1 :] - starts_W[: len(starts_W) - n + 1]
            repeated = count_top_chars(hashes_N, chars_N, n) if top else count_repeated_chars(hashes_N, chars_N, n)
            if repeated / len(text) > limit:
                return False, f"top_{n}_gram" if top else f"duplicated_{n}_n_grams"
            if not top and repeated == 0:
                break  # an n-gram of more words cannot repeat either
        return None


def count_top_chars(hashes_N: NDArray[np.uint64], chars_N: NDArray[np.int64], n: int) -> int:
    """Return the characters of all occurrences of the most frequent n-gram, with the blanks between its words.

    Of several equally frequent n-grams, the one that occurs first is taken, as datatrove does.
    """
    _, first, counts = np.unique(hashes_N, return_index=True, return_counts=True)
    most = counts.max()
    return int(most) * int(chars_N[first[counts == most].min()] + n - 1)


def count_repeated_chars(hashes_N: NDArray[np.uint64], chars_N: NDArray[np.int64], n: int) -> int:
    """Return the characters of the n-grams that occurred before; where they overlap, none is counted twice."""
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
