"""English words and sentences as datatrove splits them (spaCy's rules), without cutting the same word again and again.

datatrove runs spaCy's pipeline on every text inside a memory zone, which forgets all words when the text ends. spaCy's
tokenizer cuts a text at white space and each piece by its rules; here a piece is cut once and remembered. The results
are those of spaCy on each piece alone. On a whole text spaCy also looks for emoticons across a blank, which changes a
few words in ten thousand of code and none of the prose the tests compare.
"""

import re
from collections.abc import Iterable

from datatrove.utils.word_tokenizers import SpaCyTokenizer
from spacy.lang.lex_attrs import is_punct
from spacy.pipeline import Sentencizer

MAX_REMEMBERED = 1_000_000
"""Pieces kept, some 200 bytes each; all are forgotten when there are more."""
BREAKS_SPACY = "IS_ALPHA"
"""A word that spaCy cannot always take; datatrove leaves it out as well."""
_RUN = re.compile(r"\S+|\s+")
_CLOSING = frozenset(Sentencizer.default_punct_chars)


class EnglishWords(SpaCyTokenizer):
    """In place of datatrove's English tokenizer: pass it where a block takes a `language`."""

    def __init__(self):
        super().__init__("en")
        self._pieces: dict[str, tuple[str, ...]] = {}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        """datatrove remembers the last texts' words by text and tokenizer."""
        return hash(type(self))

    def __reduce__(self) -> tuple:
        """What is remembered stays behind when a block is sent to a worker."""
        return type(self), ()

    def word_tokenize(self, text: str) -> list[str]:
        pieces = text.split()
        self._learn(pieces)
        return [word for piece in pieces for word in self._pieces[piece]]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Sentences as (start, end), as spaCy's sentencizer finds them: the next word after closing punctuation begins
        one. White space beyond a single blank counts as a word, as it does in spaCy.
        """
        self._learn(text.split())
        spans: list[tuple[int, int]] = []
        start = end = 0
        closed = False
        for run in _RUN.finditer(text):
            at, piece = run.span()[0], run.group()
            if piece.isspace():
                # spaCy folds one blank into the word before it.
                folded = at > 0 and piece[0] == " "
                at, words = at + folded, (piece[folded:],) if piece[folded:] else ()
            else:
                words = self._pieces[piece]
            for word in words:
                closing = word in _CLOSING
                if closed and not closing and not is_punct(word):
                    spans.append((start, end))
                    start, closed = at, False
                closed = closed or closing
                at += len(word)
                end = at
        return [*spans, (start, end)] if end else spans

    def _learn(self, pieces: Iterable[str]) -> None:
        """Cut the pieces that are not known yet, all in one call."""
        distinct = dict.fromkeys(pieces)
        if len(self._pieces) + len(distinct) > MAX_REMEMBERED:
            self._pieces.clear()
        unknown = [piece for piece in distinct if piece not in self._pieces]
        cut = {piece: piece.replace(BREAKS_SPACY, "") for piece in unknown}
        self._pieces.update((piece, ()) for piece, text in cut.items() if not text)
        asked = [(piece, text) for piece, text in cut.items() if text]
        # A line break is a token of its own, so nothing is cut across two pieces.
        text = "\n".join(text for _, text in asked)
        self.tokenizer.max_length = len(text) + 1
        with self.tokenizer.memory_zone():
            lines = iter(asked)
            words: list[str] = []
            for token in self.tokenizer.make_doc(text):
                if token.is_space:
                    self._pieces[next(lines)[0]] = tuple(words)
                    words.clear()
                else:
                    words.append(token.text)
            if words:
                self._pieces[next(lines)[0]] = tuple(words)
