"""Words and sentences are datatrove's own, on real text and on any text."""

from collections import Counter
from itertools import islice

import pytest
from datatrove.utils.word_tokenizers import SpaCyTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
from data.filters.spacy_cache import MAX_PIECE_CHARS, EnglishWords

OURS, THEIRS = EnglishWords(), SpaCyTokenizer("en")
ODD = [
    "don't", "U.S.A.", ":-)", "o_O", "e.g.,", "http://a.b/c?d=e", "x ", "\u3000", "a\x1fb", "...", "?!", " ",
    "  ", "\n", "\t", ". ", "word", "(", '"', ")",
]  # fmt: skip


def texts(name: str) -> list[str]:
    corpus = CATALOGUE[name]
    return [record["text"] for record in islice(corpus.read(Unit(corpus, "", 0, 0)), 12)]


@pytest.mark.parametrize("name", ["package-descriptions", "python-topics", "scipy-docs"])
def test_prose_is_cut_exactly_as_by_datatrove(name):
    for text in texts(name):
        assert OURS.word_tokenize(text) == THEIRS.word_tokenize(text)
        assert OURS.span_tokenize(text) == THEIRS.span_tokenize(text)


def test_of_code_almost_every_word():
    ours, theirs = ([word for text in texts("python-stdlib") for word in t.word_tokenize(text)] for t in (OURS, THEIRS))
    differing = sum((Counter(ours) - Counter(theirs)).values())
    assert len(ours) > 10_000 and differing < 1e-3 * len(ours)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(ODD) | st.text(max_size=6), max_size=12).map("".join))
def test_any_text_is_cut_piece_by_piece(text):
    assert OURS.word_tokenize(text) == [word for piece in text.split() for word in THEIRS.word_tokenize(piece)]


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(["A", "b.", "c!", '"d."', " ", "  ", "\n", "...", "?!", "5"]), max_size=12).map("".join)
)
def test_sentences_of_any_text(text):
    if text:
        assert OURS.span_tokenize(text) == THEIRS.span_tokenize(text)


def test_a_word_that_breaks_spacy_is_left_out():
    assert OURS.word_tokenize("an IS_ALPHA attribute") == ["an", "attribute"]


def test_remembers_no_more_than_it_may(monkeypatch):
    monkeypatch.setattr("data.filters.spacy_cache.MAX_REMEMBERED", 50)
    words = EnglishWords()
    for number in range(200):
        assert words.word_tokenize(f"piece{number} of text.") == [f"piece{number}", "of", "text", "."]
        assert len(words._words) <= 50


class CountingTokenizer:
    """Passes texts to spaCy and remembers how long their longest piece without white space was."""

    def __init__(self, words: EnglishWords):
        self.nlp, self.longest = words.tokenizer, 0

    def __getattr__(self, name: str):
        return getattr(self.nlp, name)

    def make_doc(self, text: str):
        self.longest = max([self.longest, *map(len, text.split())])
        return self.nlp.make_doc(text)


@pytest.mark.parametrize("unit", ["_", ".", "a.", "x'", "☃", "😀👩", "1.", "字", "http://a.b/"])
def test_spacy_never_gets_a_piece_beyond_the_bound(unit):
    words = EnglishWords()
    words._tokenizer = counting = CountingTokenizer(words)
    text = (unit * 2_000)[:2_000]
    assert "".join(words.word_tokenize(text)) == text
    assert words.span_tokenize(text)[0][0] == 0
    assert counting.longest == MAX_PIECE_CHARS


@pytest.mark.parametrize("unit", ["_", "ab.", "x'y-", "1,2;", "("])
def test_a_piece_of_the_bound_is_cut_as_by_spacy_and_a_longer_one_as_its_pieces(unit):
    text = (unit * MAX_PIECE_CHARS)[: MAX_PIECE_CHARS + 7]
    first, rest = text[:MAX_PIECE_CHARS], text[MAX_PIECE_CHARS:]
    assert OURS.word_tokenize(first) == THEIRS.word_tokenize(first)
    assert OURS.span_tokenize(first) == THEIRS.span_tokenize(first)
    assert OURS.word_tokenize(text) == THEIRS.word_tokenize(first) + THEIRS.word_tokenize(rest)


def test_long_runs_are_not_remembered_whole():
    words = EnglishWords()
    words.word_tokenize("ab" * 50_000)
    assert max(map(len, words._words)) == MAX_PIECE_CHARS
