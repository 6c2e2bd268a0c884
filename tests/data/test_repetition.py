"""The fast repetition filter against datatrove's: the same verdict and the same reason."""

import random
from itertools import islice

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import GopherRepetitionFilter
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
from data.filters.repetition import RepetitionFilter
from data.filters.spacy_cache import EnglishWords

WORDS = EnglishWords()
OURS, THEIRS = RepetitionFilter(language=WORDS), GopherRepetitionFilter(language=WORDS)


def verdicts(text: str) -> tuple:
    return tuple(block.filter(Document(text=text, id="1")) for block in (OURS, THEIRS))


@pytest.mark.parametrize("name", ["package-descriptions", "python-topics", "sympy-docs", "python-stdlib"])
def test_real_text(name):
    corpus = CATALOGUE[name]
    for record in islice(corpus.read(Unit(corpus, "", 0, 0)), 25):
        ours, theirs = verdicts(record["text"])
        assert ours == theirs


def test_every_reason_comes_up_and_is_the_same():
    rng = random.Random(0)
    reasons = set()
    for _ in range(1500):
        pool = [rng.choice("abcdefghijklmnopqrstuvwxyz") * rng.randint(1, 8) for _ in range(rng.randint(2, 60))]
        phrase = " ".join(rng.choices(pool, k=rng.randint(2, 12)))
        pieces = [phrase if rng.random() < 0.4 else rng.choice(pool) for _ in range(rng.randint(1, 40))]
        text = "".join(piece + rng.choice([" ", " ", " ", "\n", "\n\n", ". "]) for piece in pieces)
        ours, theirs = verdicts(text)
        assert ours == theirs, text
        reasons.add(ours if ours is True else ours[1])
    assert {
        "dup_para_frac",
        "dup_line_frac",
        "top_2_gram",
        "top_3_gram",
        "top_4_gram",
        "duplicated_5_n_grams",
    } < reasons


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["one ", "two ", "three\n", "four. ", "five\n\n", "six, "]), min_size=1, max_size=60))
def test_any_text(pieces):
    ours, theirs = verdicts("".join(pieces))
    assert ours == theirs
