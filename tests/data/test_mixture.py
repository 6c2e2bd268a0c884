"""Tokens by split and domain against counts by hand, and what follows from them: held-out, mid-training, shares."""

import dataclasses
import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.catalogue.corpora import CATALOGUE, SMOKE_CORPORA
from data.catalogue.corpus import TEXT_DOMAINS, Corpus, RemoteFiles, Unit
from data.config import DataConfig
from data.filters.split import SplitTagger, assign_split
from data.mixture import (
    balance_midtrain,
    choose_heldout_fraction,
    count_heldout_tokens,
    count_split_tokens,
    estimate_tokens,
    limit_shares,
)
from data.readers import remote_readers
from data.work_folder import make_plan

corpus = partial(
    Corpus, domain="web", kind="text", style="prose", licence="test", read=remote_readers.read_text, text_bytes=900,
    source=RemoteFiles("s3://somewhere", "*.jsonl"),
)  # fmt: skip
LARGE = corpus(name="large", tokens=1e9)
SMALL = corpus(name="small", tokens=1e6, domain="math")
LATE = corpus(name="late", tokens=3e6, domain="math", stages=("midtrain",))
SIZED = corpus(name="sized", text_bytes=4500, domain="code")
FOLDER = corpus(name="folder", domain="web", source=RemoteFiles("/data/ours", "*.jsonl"))
CHATS = corpus(name="chats", domain="chat", kind="sft", tokens=2e6)


@pytest.fixture(autouse=True)
def entries(monkeypatch):
    for entry in (LARGE, SMALL, LATE, SIZED, FOLDER, CHATS):
        monkeypatch.setitem(CATALOGUE, entry.name, entry)


def configure(*corpora: Corpus, **changes) -> DataConfig:
    return DataConfig(corpora=tuple(entry.name for entry in corpora), **changes)


def test_tokens_are_the_publishers_or_follow_from_a_published_size_or_are_unknown():
    assert (estimate_tokens(LARGE), estimate_tokens(SIZED), estimate_tokens(FOLDER)) == (1e9, 1000, None)
    assert estimate_tokens(dataclasses.replace(FOLDER, tokens=7.0)) == 7
    assert {estimate_tokens(CATALOGUE[name]) for name in SMOKE_CORPORA} == {None}


def test_counts_by_hand():
    config = configure(
        LARGE, SMALL, LATE, CHATS, heldout_fraction=0.1, max_heldout_tokens=2_000_000,
        midtrain_fraction=dict.fromkeys(TEXT_DOMAINS, 0.25) | {"math": 0.5},
    )  # fmt: skip
    assert choose_heldout_fraction(config, LARGE) == pytest.approx(0.002)
    assert choose_heldout_fraction(config, LATE) == 0.1, "2M of 3M tokens would be more than that"
    counts = count_split_tokens(config)
    assert counts["pretrain"] == {"web": pytest.approx(1e9 * 0.998 * 0.75), "math": pytest.approx(1e6 * 0.9 * 0.5)}
    assert counts["midtrain"] == {
        "web": pytest.approx(1e9 * 0.998 * 0.25), "math": pytest.approx((1e6 * 0.5 + 3e6) * 0.9),
    }  # fmt: skip
    assert counts["sft"] == {"chat": pytest.approx(2e6 * 0.9)}
    assert count_heldout_tokens(config) == pytest.approx(2e6 + 0.1 * (1e6 + 3e6 + 2e6))
    assert count_heldout_tokens(configure(LARGE, FOLDER)) is None


@pytest.mark.parametrize("order", [(LARGE, FOLDER), (FOLDER, LARGE)])
def test_a_corpus_of_unknown_size_makes_its_domain_unknown_and_keeps_its_share(order):
    config = configure(*order, SIZED, max_heldout_tokens=1_000_000)
    assert count_split_tokens(config)["pretrain"]["web"] is None
    assert count_split_tokens(config)["pretrain"]["code"] is not None
    assert choose_heldout_fraction(config, LARGE) == pytest.approx(0.001)
    assert choose_heldout_fraction(config, FOLDER) == 0.02


def test_the_split_takes_the_fractions_of_the_units_corpus():
    config = configure(
        LARGE, SMALL, CHATS, max_heldout_tokens=100_000,
        midtrain_fraction=dict.fromkeys(TEXT_DOMAINS, 0.0) | {"math": 0.3},
    )  # fmt: skip
    units = [Unit(entry, "", 0, 0) for entry in (LARGE, SMALL, CHATS)]
    fractions = SplitTagger(units, 0, config).fractions
    assert fractions == [(pytest.approx(1e-4), 0.0), (0.02, 0.3), (0.02, 0.0)]


def test_a_catalogue_that_counts_anew_is_another_plan(monkeypatch):
    config = configure(LARGE)
    plans = []
    for tokens in (1e10, 1e11):
        entry = dataclasses.replace(LARGE, tokens=tokens)
        monkeypatch.setitem(CATALOGUE, LARGE.name, entry)
        plans.append(make_plan(config, 0, [entry], {}, None, None))
    shares = [plan["heldout_fractions"] for plan in plans]
    assert shares == [{"large": pytest.approx(1e-3)}, {"large": pytest.approx(1e-4)}] and plans[0] != plans[1]


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.99))
def test_a_larger_fraction_holds_out_what_a_smaller_one_does(text, one, other, midtrain):
    stages = ("pretrain", "midtrain")
    smaller, larger = (assign_split(text, stages, 0, share, midtrain) for share in sorted((one, other)))
    assert larger == "heldout" if smaller == "heldout" else larger in ("heldout", smaller)


@given(st.floats(1, 1e6), st.floats(0, 1e6), st.floats(1, 1e9), st.floats(0, 1e9))
def test_both_text_stages_repeat_a_domain_equally_often(first, second, both, only):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CATALOGUE, "small", dataclasses.replace(SMALL, tokens=both))
        patch.setitem(CATALOGUE, "late", dataclasses.replace(LATE, tokens=only))
        share = balance_midtrain(configure(SMALL, LATE), {"math": first}, {"math": second})["math"]
    # The stages take what is there in proportion to their needs, unless mid-training's own corpora are more than that.
    mine = max(only, (both + only) * second / (first + second))
    assert only + both * share == pytest.approx(mine, abs=both * 1e-4)
    assert 0 <= share < 1


def test_shares_that_repeat_too_often_are_lowered_and_the_others_grow():
    shares = {"math": 0.5, "chat": 0.3, "safety": 0.2}
    available = {"math": 1e9, "chat": None, "safety": 1e6}
    limited = limit_shares(shares, 1e8, available, 4)
    assert limited == {"math": pytest.approx(0.6), "chat": pytest.approx(0.36), "safety": 0.04}
    assert limit_shares(shares, 1e8, available | {"safety": 1e9}, 4) == shares
    twice = limit_shares({"a": 0.5, "b": 0.4, "c": 0.1}, 100, {"a": 100, "b": 10, "c": 3.6}, 3)
    assert twice == pytest.approx({"a": 0.592, "b": 0.3, "c": 0.108}), "c grows beyond its limit when b is lowered"
    assert limit_shares({"a": 1.0}, 100, {"a": 1.0}, 4) == {"a": 1.0}, "nothing else is there"


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.05, 1), st.floats(1, 1e3)), min_size=1),
    st.floats(1, 1e3),
)
def test_limited_shares_sum_to_one_and_keep_the_limit(domains, tokens):
    total = math.fsum(share for share, _ in domains.values())
    shares = {domain: share / total for domain, (share, _) in domains.items()}
    available = {domain: count for domain, (_, count) in domains.items()}
    limited = limit_shares(shares, tokens, available, 4)
    assert math.fsum(limited.values()) == pytest.approx(1, abs=1e-6)
    assert limited.keys() == shares.keys()
    if limited != shares:
        # The largest share takes what rounding leaves of the others.
        assert all(limited[d] * tokens <= 4 * available[d] + 1e-3 * tokens for d in limited)
