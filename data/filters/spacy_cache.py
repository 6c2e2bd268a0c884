"""English words and sentences as datatrove splits them (spaCy's rules), with a cache of words that were split before.

datatrove runs spaCy's pipeline on every text inside a memory zone, which forgets all words when the text ends. spaCy's
tokenizer splits a text at white space and each piece by its rules; here a piece is split once and remembered. The
results are those of spaCy on each piece alone. On a whole text spaCy also looks for emoticons across a blank. That
changes a few words in ten thousand of code, and none of the prose that the tests compare.

spaCy's time grows with the square of a piece's length, because it takes punctuation off the ends one character at a
time and searches the rest again. So a run of characters without white space is cut into pieces of MAX_PIECE_CHARS: a
shorter one gives spaCy's words, and a longer one the words of its pieces.
"""

import re
from collections.abc import Iterable

from datatrove.utils.word_tokenizers import SpaCyTokenizer

from data import compat

MAX_REMEMBERED = 1_000_000
"""Largest number of pieces in the cache, some 200 bytes each; a piece beyond it empties the cache."""
MAX_PIECE_CHARS = 256
"""Largest number of characters that spaCy gets at once. In ordinary text only addresses and encoded data are longer."""
_PIECE = re.compile(rf"\S{{1,{MAX_PIECE_CHARS}}}")
_RUN = re.compile(rf"\S{{1,{MAX_PIECE_CHARS}}}|\s+")


class EnglishWords(SpaCyTokenizer):
    """Splits English text as datatrove's tokenizer does; pass it where a block takes a `language`."""

    def __init__(self):
        super().__init__("en")
        self._words: dict[str, tuple[str, ...]] = {}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        """Return the same hash for all instances: datatrove caches a text's words by text and tokenizer."""
        return hash(type(self))

    def __reduce__(self) -> tuple:
        """Pickle without the cache, which need not travel to a worker with its block."""
        return type(self), ()

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        pieces = _PIECE.findall(text)
        self._learn(pieces)
        return [word for piece in pieces for word in self._words[piece]]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return the sentences as (start, end), by the rule of spaCy's sentencizer.

        The next word after closing punctuation begins a sentence. White space beyond a single blank counts as a word,
        as it does in spaCy.
        """
        self._learn(_PIECE.findall(text))
        spans: list[tuple[int, int]] = []
        start = end = 0
        closed = False
        words: tuple[str, ...]
        for run in _RUN.finditer(text):
            position, piece = run.span()[0], run.group()
            if piece.isspace():
                # spaCy keeps one blank with the word before it.
                folded = position > 0 and piece[0] == " "
                position, words = position + folded, (piece[folded:],) if piece[folded:] else ()
            else:
                words = self._words[piece]
            for word in words:
                closing = word in compat.SENTENCE_ENDS
                if closed and not closing and not compat.is_punct(word):
                    spans.append((start, end))
                    start, closed = position, False
                closed = closed or closing
                position += len(word)
                end = position
        return [*spans, (start, end)] if end else spans

    def _learn(self, pieces: Iterable[str]) -> None:
        """Split the pieces that are not in the cache, all in one call of spaCy."""
        distinct = dict.fromkeys(pieces)
        if len(self._words) + len(distinct) > MAX_REMEMBERED:
            self._words.clear()
        texts = {piece: piece.replace(compat.UNTOKENIZABLE, "") for piece in distinct if piece not in self._words}
        self._words.update((piece, ()) for piece, text in texts.items() if not text)
        texts = {piece: text for piece, text in texts.items() if text}
        found = compat.tokenize_lines(self, list(texts.values()))
        self._words.update(zip(texts, map(tuple, found), strict=True))
