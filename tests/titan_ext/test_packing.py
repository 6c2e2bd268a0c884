"""Lanes and packing against a plain packer that goes token by token, and against the rules of packing."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.errors import RefusedInput
from titan_ext.loader.domain import Document
from titan_ext.loader.order import Place
from titan_ext.loader.packing import IGNORE_INDEX, Lane, LaneState, compute_initial_deficits, write_sequence

PAD = 7
STRIDE = 1000  # token i of document n is (n + 1) * STRIDE + i, so a token shows which document it is from


@dataclass
class ListDomain:
    """A domain of documents in memory, which always come in the same order."""

    name: str
    documents: list[Document]
    source: str = "memory"
    reads: int = 0

    @property
    def num_documents(self) -> int:
        return len(self.documents)

    @property
    def mean_tokens(self) -> float:
        """Return the mean length, never 0: Domain's is never 0 either, as sizes in bytes include a header."""
        return 1 + float(np.mean([len(d.tokens) for d in self.documents]))

    def scan_documents(self):
        for document in self.documents:
            self.reads += 1
            yield document


@dataclass
class ListQueue:
    """Every `step`-th document of a ListDomain from `first` on, again and again."""

    domain: ListDomain
    first: int
    step: int
    drawn: int = 0

    @property
    def is_first_epoch_over(self) -> bool:
        return self.first + self.drawn * self.step >= self.domain.num_documents

    def draw(self):
        place = Place(0, self.drawn)
        self.drawn += 1
        return place, self.read(place)

    def read(self, place: Place) -> Document:
        self.domain.reads += 1
        return self.domain.documents[(self.first + place.position * self.step) % self.domain.num_documents]


def make_domains(lengths_by_domain, masks=None):
    domains, n = [], 0
    for d, lengths in enumerate(lengths_by_domain):
        documents = []
        for i, length in enumerate(lengths):
            tokens = (np.arange(length) + (n + 1) * STRIDE).astype(np.uint32)
            mask = None if masks is None else np.resize(np.array(masks[d][i], np.uint8), length)
            documents.append(Document(tokens, mask))
            n += 1
        domains.append(ListDomain(f"domain{d}", documents))
    return domains


def make_lane(domains, seq_len, weights=None, index=0, num_lanes=1, single_pass=False, resumed=None):
    """Return lane `index` of `num_lanes`, or the one that goes on where the lane `resumed` stands."""
    queues = [ListQueue(domain, index, num_lanes) for domain in domains]
    state = LaneState(tokens=[0] * len(domains))
    if resumed:
        state = resumed.state
        queues = [ListQueue(queue.domain, index, num_lanes, queue.drawn) for queue in resumed.queues]
    weights = weights or [1 / len(domains)] * len(domains)
    deficits = compute_initial_deficits(domains, weights, num_lanes)[index]
    return Lane(queues, weights, seq_len, single_pass, deficits, state)


def rows(lane, count=None):
    """Return (input, positions, labels) of the next `count` sequences, or of all of them."""
    result = []
    while count is None or len(result) < count:
        segments = lane.next_sequence()
        if not segments:
            break
        row = np.full((3, lane.seq_len), -1, np.int64)
        write_sequence(segments, row[0], row[1], row[2], PAD)
        result.append(row)
    return result


def reference_pack(documents, seq_len):
    """Pack one pass over `documents` in plain Python: rows of (input, position, label) triples."""
    done, row = [], []

    def close():
        row.extend((PAD, position, IGNORE_INDEX) for position in range(seq_len - len(row)))
        done.append(list(row))
        row.clear()

    for document in documents:
        tokens = [int(t) for t in document.tokens]
        triples = list(pairwise(tokens))
        if document.loss_mask is None:
            position = 0
            for token, label in triples:
                row.append((token, position, label))
                position += 1
                if len(row) == seq_len:
                    close()
                    position = 0
            continue
        labels = [label if on else IGNORE_INDEX for (_, label), on in zip(triples, document.loss_mask[1:], strict=True)]
        labels = labels[:seq_len]
        if all(label == IGNORE_INDEX for label in labels):
            continue
        if len(row) + len(labels) > seq_len:
            close()
        row.extend((tokens[i], i, label) for i, label in enumerate(labels))
        if len(row) == seq_len:
            close()
    if row:
        close()
    return [np.array(r).T for r in done]


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=20)
masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=20, max_size=20)


@settings(max_examples=30)
@given(lengths=lengths, seq_len=st.integers(2, 16))
def test_text_is_packed_as_the_reference_packs_it(lengths, seq_len):
    (domain,) = make_domains([lengths])
    packed = rows(make_lane([domain], seq_len, single_pass=True))
    expected = [np.array([r[0], r[1], r[2]]) for r in reference_pack(domain.documents, seq_len)]
    np.testing.assert_array_equal(np.array(packed), np.array(expected))


@settings(max_examples=30)
@given(lengths=lengths, masks=masks, seq_len=st.integers(2, 16))
def test_conversations_are_packed_as_the_reference_packs_them(lengths, masks, seq_len):
    (domain,) = make_domains([lengths], [masks])
    packed = rows(make_lane([domain], seq_len, single_pass=True))
    np.testing.assert_array_equal(np.array(packed), np.array(reference_pack(domain.documents, seq_len)))


@settings(max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=5), min_size=1, max_size=3),
    seq_len=st.integers(2, 16),
    index=st.integers(0, 2),
)
def test_every_label_follows_its_input_and_positions_do_not_cross_documents(lengths, seq_len, index):
    for input_L, positions_L, labels_L in rows(make_lane(make_domains(lengths), seq_len, index=index, num_lanes=3), 10):
        assert (labels_L == input_L + 1).all()
        continues = positions_L[1:] != 0
        assert positions_L[0] == 0
        assert (positions_L[1:][continues] == positions_L[:-1][continues] + 1).all()
        # Within a run of positions the document is one, and a new document is a new run.
        assert (continues == (input_L[1:] == input_L[:-1] + 1)).all()


@settings(max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=6), min_size=2, max_size=4),
    shares=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    index=st.integers(0, 7),
)
def test_shares_stay_within_a_document_of_the_mixture(lengths, shares, index):
    domains = make_domains(lengths)
    weights = [share / sum(shares[: len(domains)]) for share in shares[: len(domains)]]
    lane = make_lane(domains, 16, weights, index=index, num_lanes=8)
    longest = max(max(item) for item in lengths)
    slack = longest + max(map(abs, lane.initial_deficits))
    for _ in range(200):
        lane.next_sequence()
        ahead = np.array(lane.state.tokens) - np.array(weights) * sum(lane.state.tokens)
        assert ahead.max() <= slack
        # The deficit of one domain is the surplus of the others.
        assert ahead.min() >= -slack * (len(domains) - 1)


def test_every_batch_is_close_to_the_mixture_from_the_first_on():
    """Without initial deficits all lanes draw from the same domain at the same time, and a batch holds one domain."""
    rng = np.random.default_rng(0)
    domains = make_domains([rng.integers(mean // 2, mean * 2, 200) for mean in (30, 60, 30, 15)])
    weights = [0.6, 0.2, 0.1, 0.1]
    lanes = [make_lane(domains, 48, weights, index=index, num_lanes=64) for index in range(64)]
    before = np.zeros(4)
    for _ in range(20):
        for lane in lanes:
            lane.next_sequence()
        tokens_D = np.sum([lane.state.tokens for lane in lanes], axis=0)
        np.testing.assert_allclose((tokens_D - before) / (64 * 48), weights, atol=0.2)
        before = tokens_D


def draws_of_second_lane(lengths):
    """Return what lane 1 of 2 draws: every other one of an even number of documents, else all of them."""
    return lengths if len(lengths) % 2 else lengths[1::2]


@settings(max_examples=30)
@example(lengths=[0, 2], conversations=False, cut=0)
@given(
    lengths=lengths.filter(lambda item: max(draws_of_second_lane(item)) > 1), conversations=st.booleans(),
    cut=st.integers(0, 12),
)  # fmt: skip
def test_a_lane_resumes_from_its_state_at_any_sequence(lengths, conversations, cut):
    domains = make_domains([lengths, [5, 9]], [[[0, 1]] * len(lengths), [[1]] * 2] if conversations else None)
    lane = make_lane(domains, 8, index=1, num_lanes=2)
    whole = rows(lane, 20)
    first = make_lane(domains, 8, index=1, num_lanes=2)
    rows(first, cut)
    resumed = make_lane(domains, 8, index=1, num_lanes=2, resumed=first)
    np.testing.assert_array_equal(rows(resumed, 20 - cut), whole[cut:])
    assert resumed.state == lane.state


def test_what_is_truncated_skipped_and_padded_is_counted():
    domains = make_domains([[12, 4, 6, 1]], [[[1], [0], [1], [1]]])
    lane = make_lane(domains, 8, single_pass=True)
    packed = rows(lane)
    assert lane.state.truncated == 1  # 11 pairs in 8 positions
    assert lane.state.skipped == 2  # no target, and no pair at all
    assert lane.state.padding == 3  # the conversation of 5 pairs did not fit behind the first
    assert [row[0][0] // STRIDE for row in packed] == [1, 3]
    np.testing.assert_array_equal(packed[1][1], [0, 1, 2, 3, 4, 0, 1, 2])
    np.testing.assert_array_equal(packed[1][2][5:], [IGNORE_INDEX] * 3)
    np.testing.assert_array_equal(packed[1][0][5:], [PAD] * 3)


@pytest.mark.parametrize(
    ("lengths", "masks"),
    [
        ([1, 1, 1], None),  # too short
        ([0], None),
        ([5, 6], [[0], [0]]),  # nothing is trained
        ([5, 20], [[1, 0, 0, 0, 0], [0] * 12 + [1] * 8]),  # a first token is no target; an answer beyond the sequence
        ([1] * 3000, None),
    ],
)
def test_a_domain_without_any_target_is_refused_instead_of_searched_for_ever(lengths, masks):
    good, bad = make_domains([[9, 9], lengths], masks and [[[1], [1]], masks])
    lane = make_lane([good, bad], 8)
    message = (
        rf"'domain1' \(memory\): none of its {len(lengths)} documents .* within 8 .*longest has {max(lengths)} tok"
    )
    with pytest.raises(RefusedInput, match=message):
        rows(lane, 100)
    assert bad.reads <= 2 * len(lengths)


def test_a_rare_document_with_a_target_is_found():
    (domain,) = make_domains([[1] * 2500 + [5]])
    packed = rows(make_lane([domain], 4), 3)
    assert [row[0].tolist() for row in packed] == [[2501 * STRIDE + i for i in range(4)]] * 3


def test_a_share_of_almost_nothing_begins_soon(monkeypatch):
    domains = make_domains([[9] * 4, [9] * 4])
    assert compute_initial_deficits(domains, [0.75, 0.25], 4) == [[0, 0], [-2.5, 2.5], [5, -5], [2.5, -2.5]]
    # One cycle would simulate 10^12 documents. Without its turn, the rare domain keeps what it was given at the start.
    monkeypatch.setattr("titan_ext.loader.packing.MAX_SIMULATED_DOCUMENTS", 1000)
    rare = compute_initial_deficits(domains, [1 - 1e-12, 1e-12], 4)
    np.testing.assert_allclose(rare, [[0, 0], [10, -10], [10, -10], [10, -10]], atol=1e-6)


@pytest.mark.parametrize("change", ["token", "mask", "order"])
def test_the_digest_of_a_lane_changes_with_any_token_any_target_and_their_order(change):
    def pack(documents, count=3):
        lane = make_lane([ListDomain("chat", documents)], 16)
        rows(lane, count)
        return lane.state.digest

    def make():
        return make_domains([[9, 12, 7, 15]], [[[0, 1]] * 4])[0].documents

    changed = make()
    if change == "token":
        changed[2].tokens[3] += 1
    elif change == "mask":
        changed[2].loss_mask[4] ^= 1
    else:
        changed[1], changed[2] = changed[2], changed[1]
    assert pack(make()) == pack(make()) != pack(changed)
    assert len({pack(make(), count) for count in (0, 1, 2, 3)}) == 4
