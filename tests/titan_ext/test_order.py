"""The order of documents: every one once an epoch, sections apart, shards held for a bounded time, exact resume.

The domains are real, over stores in memory whose documents have any lengths.
"""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_ext.loader.domain import Domain
from titan_ext.loader.order import (
    AHEAD_SHARDS,
    BEGIN,
    HELD_SHARDS,
    MAX_SECTIONS,
    WINDOW_SHARDS,
    EpochOrder,
    count_sections,
    list_sections,
    sum_held_bytes,
)
from titan_ext.loader.packing import compute_initial_deficits
from titan_ext.loader.section import Section, SectionState


class MemoryStore:
    """Shards whose documents have given lengths; token i of a document is its number in the store."""

    source = "memory"

    def __init__(self, shards: list[list[int]]):
        self.lengths = shards
        self.numbers = np.cumsum([0, *map(len, shards)])
        self.index = SimpleNamespace(
            samples=np.array([len(shard) for shard in shards], np.int64),
            raw_bytes=np.array([4 * sum(shard) + 8 * len(shard) + 8 for shard in shards], np.int64),
            column_names=["tokens"],
        )
        self.reads = 0
        self.requested: dict[int, int] = {}
        self.late: set[int] = set()

    def prefetch(self, shards):
        self.requested = {shard: self.requested.get(shard, self.reads) for shard in shards}

    def read(self, shard, index):
        if self.requested.get(shard, self.reads) == self.reads > 0:
            self.late.add(shard)
        self.reads += 1
        return {"tokens": np.full(self.lengths[shard][index], self.numbers[shard] + index, np.uint32)}


shard_lengths = st.lists(st.lists(st.integers(0, 40), max_size=12), min_size=1, max_size=25).filter(
    lambda shards: any(length > 1 for shard in shards for length in shard)
)
WEIGHTS = [0.7, 0.3]


def make_domains(shards, num_sections):
    stores = [MemoryStore(shards), MemoryStore([[5, 9, 3]] * 7)]
    return [
        Domain(name, store, seed=3, num_sections=num_sections)
        for name, store in zip(("web", "code"), stores, strict=True)
    ]


def make_section(domains, index, lanes, num_sections, state=None):
    deficits = compute_initial_deficits(domains, WEIGHTS, lanes * num_sections)
    state = state or SectionState.begin(len(domains), lanes)
    return Section(index, domains, WEIGHTS, 16, deficits[index * lanes : (index + 1) * lanes], state)


def describe(sequences):
    return [[(s.document.tokens[:1].tolist(), s.begin, s.end) for s in row] for row in sequences]


@settings(max_examples=50)
@given(shards=shard_lengths, num_sections=st.integers(1, MAX_SECTIONS), epoch=st.integers(0, 3))
def test_the_shares_of_an_epoch_have_every_document_once(shards, num_sections, epoch):
    index = MemoryStore(shards).index
    order = EpochOrder(index.samples, index.raw_bytes, num_sections, (1, 2, epoch))
    shares = [order.take_share(section) for section in range(num_sections)]
    located = [share.locate(position) for share in shares for position in range(share.num_documents)]
    assert sorted(located) == [(shard, i) for shard, size in enumerate(index.samples) for i in range(size)]


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60), num_sections=st.integers(1, 8))
def test_shares_are_equal_to_within_two_documents_where_documents_are_equally_long(sizes, num_sections):
    sizes = np.array(sizes)
    order = EpochOrder(sizes, 100 * sizes, num_sections, (0, 1, 0))
    counts = [order.take_share(section).num_documents for section in range(num_sections)]
    assert max(abs(count - sizes.sum() / num_sections) for count in counts) <= 1


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any), num_sections=st.integers(1, 5))
def test_a_share_uses_few_shards_at_a_time_and_returns_to_none(sizes, num_sections):
    sizes = np.array(sizes)
    order = EpochOrder(sizes, sizes + 1, num_sections, (0, 1, 0))
    for share in map(order.take_share, range(num_sections)):
        used = [share.locate(position)[0] for position in range(share.num_documents)]
        slots = [share.find_slot(position) for position in range(share.num_documents)]
        assert slots == sorted(slots)
        for shard, slot in zip(used, slots, strict=True):
            assert shard in share.list_shards(slot)
            # It was to be fetched while the slot before was read, or before the share began.
            assert shard in (share.list_shards(slot - 1) if slot else share.list_first_shards())
        for shard in set(used):
            of_shard = [slot for at, slot in zip(used, slots, strict=True) if at == shard]
            assert max(of_shard) - min(of_shard) < WINDOW_SHARDS
        for slot in range(share.num_slots):
            assert len(share.list_shards(slot)) <= WINDOW_SHARDS + AHEAD_SHARDS


def test_epochs_seeds_and_sections_have_orders_of_their_own():
    sizes = np.full(40, 10)

    def list_order(seed, section=0):
        share = EpochOrder(sizes, 100 * sizes, 2, seed).take_share(section)
        return [share.locate(position) for position in range(share.num_documents)]

    orders = [list_order((0, 1, 0)), list_order((0, 1, 1)), list_order((1, 1, 0)), list_order((0, 1, 0), section=1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert orders[0] == list_order((0, 1, 0))
    mixed = [len({shard for shard, _ in orders[0][at : at + 10]}) for at in range(40, 150, 10)]
    assert min(mixed) >= WINDOW_SHARDS - 1, "neighbouring documents are of several shards"


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(
        st.lists(st.sampled_from([2, 3, 50, 1000]), min_size=WINDOW_SHARDS, max_size=12), min_size=6, max_size=25
    ),
    num_sections=st.integers(1, 2), lanes=st.integers(1, 4),
)  # fmt: skip
def test_adversarial_lengths_never_move_a_section_beyond_its_bound(shards, num_sections, lanes):
    """Whatever the lengths, over several epochs: few shards are held, and none is asked for only when it is needed."""
    for index in range(num_sections):
        domains = make_domains(shards, num_sections)
        section = make_section(domains, index, lanes, num_sections)
        for _ in range(60):
            section.next_sequences()
            for queue in section.queues:
                assert len(set(queue.held)) <= WINDOW_SHARDS + AHEAD_SHARDS
        assert [domain.store.late for domain in domains] == [set(), set()]


@settings(max_examples=40, deadline=None)
@given(shards=shard_lengths, num_sections=st.integers(1, 4))
def test_sections_draw_every_document_once_before_they_begin_again(shards, num_sections):
    domains = make_domains(shards, num_sections)
    web = domains[0]
    drawn = []
    for index in range(num_sections):
        queue = web.open_queue(index, BEGIN, fetch_ahead=False)
        while not queue.is_first_epoch_over:
            place, _ = queue.draw()
            drawn.append(web.take_share(index, 0).locate(place.position))
    assert sorted(drawn) == [(shard, i) for shard, size in enumerate(web.store.index.samples) for i in range(size)]


@settings(max_examples=40, deadline=None)
@given(shards=shard_lengths, lanes=st.integers(1, 4), cut=st.integers(0, 15))
def test_a_section_resumes_from_its_state_after_any_batch(shards, lanes, cut):
    whole = make_section(make_domains(shards, 2), 1, lanes, 2)
    expected = [describe(whole.next_sequences()) for _ in range(16)]
    first = make_section(make_domains(shards, 2), 1, lanes, 2)
    for _ in range(cut):
        first.next_sequences()
    state = SectionState.from_dict(json.loads(json.dumps(first.state.to_dict())))
    assert state == first.state
    resumed = make_section(make_domains(shards, 2), 1, lanes, 2, state)
    assert [describe(resumed.next_sequences()) for _ in range(16 - cut)] == expected[cut:]
    assert resumed.state == whole.state


@pytest.mark.parametrize(
    ("global_batch", "sections"), [(2048, 32), (512, 32), (256, 32), (8, 8), (100, 25), (7, 7), (37, 1), (1, 1)]
)
def test_the_number_of_sections_divides_the_global_batch(global_batch, sections):
    assert count_sections(global_batch) == sections


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_ranks_cover_the_sections_of_their_lanes(ranks, rows, node_ranks):
    global_batch = ranks * rows
    lanes = global_batch // count_sections(global_batch)
    for first in range(0, ranks, node_ranks):
        last = min(first + node_ranks, ranks)
        expected = {lane // lanes for lane in range(first * rows, last * rows)}
        assert set(list_sections(global_batch, ranks, first, last)) == expected


def test_the_published_layouts_have_a_share_of_the_sections_on_every_node():
    assert [len(list_sections(2048, 8 * nodes, 0, 8)) for nodes in (1, 8, 16, 32, 64)] == [32, 4, 2, 1, 1]


def test_the_cache_is_what_the_sections_hold_or_all_shards_if_that_is_less():
    assert sum_held_bytes(4, [(64, 10_000), (64, 100)]) == 4 * HELD_SHARDS * 64 + 100
