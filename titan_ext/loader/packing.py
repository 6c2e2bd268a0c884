"""Lanes: the unit a stream of packed sequences is cut into, so that its order does not depend on the number of ranks.

A global batch of G sequences is G lanes; lane j fills the j-th sequence of every batch from documents of its own. Its
k-th draw from domain d is document j + k*G of that domain's endless order (`shards.Domain.document`), so lanes never
meet, no document comes twice in an epoch, and a lane needs to know nothing of the others. Ranks own lanes; a lane's
whole state is a few integers.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.errors import RefusedInput
from titan_ext.loader.domain import Document, Domain

IGNORE_INDEX = -100


@dataclass
class LaneState:
    """Where a lane stands; lists are by domain. Enough to go on at the next unseen token."""

    draws: list[int]
    """Documents drawn."""
    tokens: list[int]
    """Positions filled."""
    domain: int = -1
    """Domain of the open document (its last draw); -1: none is open."""
    offset: int = 0
    """Pairs of the open document already placed."""
    sequences: int = 0
    padding: int = 0
    """Positions filled with padding."""
    truncated: int = 0
    """Conversations longer than a sequence, cut at its end."""
    skipped: int = 0
    """Documents of fewer than two tokens and conversations without a target in reach."""


class Segment(NamedTuple):
    """Pairs [begin, end) of a document, as they stand in a sequence."""

    document: Document
    begin: int
    end: int


@dataclass
class Lane:
    """Packs documents into sequences of `seq_len`; see the module's docstring.

    The next document comes from the domain furthest behind its share: argmax of weight_d * total - tokens_d plus the
    lane's head start. With `once`, a domain whose documents are used up drops out, and the lane ends when all have.
    """

    index: int
    num_lanes: int
    domains: Sequence[Domain]
    weights: Sequence[float]
    """Share of the tokens by domain, sums to 1."""
    seq_len: int
    once: bool
    head_start: Sequence[float]
    """Tokens by domain, see `head_starts`."""
    state: LaneState
    _document: Document | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.state = deepcopy(self.state)

    def next_sequence(self) -> list[Segment]:
        """Segments of the next sequence, in order; what they leave free is padding. Empty: the lane has ended."""
        segments: list[Segment] = []
        room = self.seq_len
        while room and (document := self._open_document()) is not None:
            segment = self._cut(document, room)
            if segment is None:
                break
            segments.append(segment)
            room -= segment.end - segment.begin
        if segments:
            self.state.sequences += 1
            self.state.padding += room
        return segments

    def _cut(self, document: Document, room: int) -> Segment | None:
        """The part of the open document that goes into the `room` left; None: it waits for the next sequence."""
        state = self.state
        begin = state.offset
        if document.loss_mask is None:
            end = min(document.num_pairs, begin + room)
            closes = end == document.num_pairs
        else:
            # An answer cut off from its question would be trained on without it: conversations stay whole.
            end, closes = min(document.num_pairs, self.seq_len), True
            if end > room:
                return None
            state.truncated += document.num_pairs > self.seq_len
        state.tokens[state.domain] += end - begin
        state.offset = end
        if closes:
            state.domain, state.offset, self._document = -1, 0, None
        return Segment(document, begin, end)

    def _open_document(self) -> Document | None:
        if self.state.domain >= 0 and self._document is None:  # resumed within a document
            self._document = self._drawn(self.state.domain)
        barren = 0
        while self._document is None:
            choice = self._furthest_behind()
            if choice is None:
                return None
            self.state.draws[choice] += 1
            document = self._drawn(choice)
            if self._has_target(document):
                self._document, self.state.domain = document, choice
                break
            self.state.skipped += 1
            barren += 1
            if not self.once and barren > 1000 + self.domains[choice].num_documents:
                raise RefusedInput(
                    f"domain {self.domains[choice].name!r}: none of {barren} documents drawn in a row has a token to "
                    f"train on within {self.seq_len} positions; check the domain's loss_mask, or raise seq_len"
                )
        return self._document

    def _drawn(self, domain: int) -> Document:
        """The last document drawn from `domain`."""
        return self.domains[domain].document(self.index + (self.state.draws[domain] - 1) * self.num_lanes)

    def _furthest_behind(self) -> int | None:
        tokens = self.state.tokens
        total = sum(tokens)
        best, best_deficit = None, -math.inf
        for d, domain in enumerate(self.domains):
            if self.once and self.index + self.state.draws[d] * self.num_lanes >= domain.num_documents:
                continue
            deficit = self.weights[d] * total - tokens[d] + self.head_start[d]
            if deficit > best_deficit:
                best, best_deficit = d, deficit
        return best

    def _has_target(self, document: Document) -> bool:
        if document.loss_mask is None:
            return document.num_pairs > 0
        return bool(document.loss_mask[1 : self.seq_len + 1].any())


def fill(
    segments: Sequence[Segment],
    input_L: NDArray[np.int64],
    positions_L: NDArray[np.int64],
    labels_L: NDArray[np.int64],
    pad_token_id: int,
) -> None:
    """Write one sequence (all arrays int64 [L], overwritten) from its segments.

    Positions count from 0 in every segment, also in one that continues a text of the sequence before: attention cannot
    reach back there, so to the model it is the beginning of a document, and torchtitan tells documents apart by
    position 0. Labels are IGNORE_INDEX where the loss mask of the label's token is 0. The padding is a document of its
    own.
    """
    at = 0
    for (tokens, loss_mask), begin, end in (
        ((s.document.tokens, s.document.loss_mask), s.begin, s.end) for s in segments
    ):
        stop = at + end - begin
        input_L[at:stop] = tokens[begin:end]
        labels_L[at:stop] = tokens[begin + 1 : end + 1]
        if loss_mask is not None:
            labels_L[at:stop][loss_mask[begin + 1 : end + 1] == 0] = IGNORE_INDEX
        positions_L[at:stop] = np.arange(end - begin)
        at = stop
    input_L[at:] = pad_token_id
    labels_L[at:] = IGNORE_INDEX
    positions_L[at:] = np.arange(len(positions_L) - at)


def head_starts(domains: Sequence[Domain], weights: Sequence[float], num_lanes: int) -> list[list[float]]:
    """By lane and domain: how many tokens the domain is behind its share when the lane begins.

    Lanes that all began at zero would go through the mixture in step: a first batch of web only, a second of math. So
    each begins at another point of one imagined past, with the document drawn there. In that past every document has
    its domain's mean length, and the points are spread over the time the rarest domain takes to come round. Lane 0
    begins at zero.
    """
    means = [domain.mean_tokens for domain in domains]
    cycle = max(mean / weight for mean, weight in zip(means, weights, strict=True))
    tokens, total = [0.0] * len(domains), 0.0
    starts: list[list[float]] = []
    while len(starts) < num_lanes:
        behind = [weight * total - t for weight, t in zip(weights, tokens, strict=True)]
        d = behind.index(max(behind))
        tokens[d] += means[d]
        total += means[d]
        while len(starts) < num_lanes and cycle * len(starts) / num_lanes < total:
            starts.append(behind)
    return starts
