"""This module packs documents into sequences: one lane packs the sequences of one row of the global batch.

The lanes of a section draw their documents from the same queue of every domain, in the order of their rows, so no lane
runs ahead of another one in the order of the documents (`titan_ext.loader.section`). What a lane packs depends on its
section alone.

Shape legend: L tokens of a sequence.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from core.errors import RefusedInput
from titan_ext.loader.domain import Document, Domain
from titan_ext.loader.order import BEGIN, Place

IGNORE_INDEX = -100
"""Label of a position that has no part in the loss, as in torch.nn.functional.cross_entropy."""
SKIPPED_BEFORE_SEARCH = 1000
"""Number of documents skipped in a row after which a lane makes sure that the domain has one to train on."""
MAX_SIMULATED_DOCUMENTS = 100_000
"""Largest number of documents of the simulated run of `compute_initial_deficits`, less than a second."""


@dataclass
class LaneState:
    """The state from which a lane resumes at the next unseen token.

    The document that a lane packs at the moment is called open.
    """

    tokens: list[int]
    """Number of positions filled, by domain."""
    domain: int = -1
    """Index of the open document's domain, -1 when no document is open."""
    place: Place = BEGIN
    """Place of the open document in its domain."""
    offset: int = 0
    """Number of pairs of the open document that are packed already."""
    sequences: int = 0
    """Number of sequences packed."""
    padding: int = 0
    """Number of positions filled with padding."""
    truncated: int = 0
    """Number of conversations that were cut to the length of a sequence, because they are longer than a sequence."""
    skipped: int = 0
    """Number of documents skipped: fewer than two tokens, or a conversation without a target in its first L pairs."""
    counted_from: list[int] = field(default_factory=list)
    """Number of positions filled when the present mixture began, from which its shares are counted; empty: none."""
    digest: str = ""
    """Hash of all sequences packed, in their order, 16 hex digits; empty before the first one."""


class Segment(NamedTuple):
    """A part of a sequence: the (input, label) pairs [begin, end) of one document."""

    document: Document
    begin: int
    end: int


class Queue(Protocol):
    """The part of `titan_ext.loader.domain.DocumentQueue` that a lane uses."""

    @property
    def domain(self) -> Domain:
        """Return the domain of the documents."""

    @property
    def is_first_epoch_over(self) -> bool:
        """Return whether every document of the first epoch was drawn."""

    def draw(self) -> tuple[Place, Document]:
        """Return the next document and its place."""

    def read(self, place: Place) -> Document:
        """Return a document that was drawn before."""


@dataclass
class Lane:
    """A lane packs documents into sequences of `seq_len` tokens; see the module's docstring.

    The next document is drawn from the domain with the largest deficit: weight_d * total - tokens_d plus the lane's
    initial deficit, where total is the number of positions filled since the mixture began. With `single_pass`, a domain
    whose documents are used up is left out, and the lane ends when all domains are used up.
    """

    queues: Sequence[Queue]
    """The section's queue of each domain."""
    weights: Sequence[float]
    """Share of the tokens by domain; sums to 1."""
    seq_len: int
    single_pass: bool
    """Draw every document of the first epoch once; otherwise go through the documents again and again."""
    initial_deficits: Sequence[float]
    """Number of tokens by domain, from `compute_initial_deficits`."""
    state: LaneState
    _document: Document | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        self.state = deepcopy(self.state)

    def next_sequence(self) -> list[Segment]:
        """Return the segments of the next sequence in their order, or an empty list when the lane has ended.

        The positions after the last segment are padding.

        Raises:
            RefusedInput: a domain has documents, but none of them has a target.
            DamagedData: a shard is damaged and cannot be fetched again, or a loss mask does not fit its tokens.
            OSError: the disk of the cache is full.
        """
        segments: list[Segment] = []
        free = self.seq_len
        while free and (document := self._open_document()) is not None:
            segment = self._cut_segment(document, free)
            if segment is None:
                break
            segments.append(segment)
            free -= segment.end - segment.begin
        if segments:
            self.state.sequences += 1
            self.state.padding += free
            self.state.digest = extend_digest(self.state.digest, segments)
        return segments

    def _cut_segment(self, document: Document, free: int) -> Segment | None:
        """Return the part of the open document that goes into the `free` positions.

        The result is None for a conversation that does not fit. It then begins the next sequence instead.
        """
        state = self.state
        begin = state.offset
        if document.loss_mask is None:
            end = min(document.num_pairs, begin + free)
            closes = end == document.num_pairs
        else:
            # Conversations are never split over two sequences: the model would train on an answer without its question.
            end, closes = min(document.num_pairs, self.seq_len), True
            if end > free:
                return None
            state.truncated += document.num_pairs > self.seq_len
        state.tokens[state.domain] += end - begin
        state.offset = end
        if closes:
            state.domain, state.offset, self._document = -1, 0, None
        return Segment(document, begin, end)

    def _open_document(self) -> Document | None:
        """Return the open document, or draw the next one that has a target. Return None when the lane has ended."""
        if self.state.domain >= 0 and self._document is None:  # the lane was resumed within a document
            self._document = self.queues[self.state.domain].read(self.state.place)
        skipped_in_a_row = 0
        while self._document is None:
            choice = self._choose_domain()
            if choice is None:
                return None
            place, document = self.queues[choice].draw()
            if self._has_target(document):
                self._document, self.state.domain, self.state.place = document, choice, place
                break
            self.state.skipped += 1
            skipped_in_a_row += 1
            # A skipped document fills no position, so the deficits stay the same and the same domain is chosen again.
            # Without this check the loop would never end.
            domain = self.queues[choice].domain
            if not self.single_pass and skipped_in_a_row == min(SKIPPED_BEFORE_SEARCH, domain.num_documents):
                self._check_has_target(domain)
        return self._document

    def _check_has_target(self, domain: Domain) -> None:
        """Read a domain's documents up to the first one that has a target.

        Raises:
            RefusedInput: none has one.
        """
        longest = 0
        for document in domain.scan_documents():
            if self._has_target(document):
                return
            longest = max(longest, len(document.tokens))
        raise RefusedInput(
            f"domain {domain.name!r} ({domain.source}): none of its {domain.num_documents} documents has a token to "
            f"train on within {self.seq_len} positions (the longest has {longest} tokens, and a document needs 2); "
            "leave the domain out of the mixture, check its loss_mask, or raise seq_len"
        )

    def _choose_domain(self) -> int | None:
        """Return the domain with the largest deficit, or None when a single pass has used up all documents."""
        tokens = self.state.tokens
        if self.state.counted_from:
            tokens = [filled - before for filled, before in zip(tokens, self.state.counted_from, strict=True)]
        total = sum(tokens)
        best, best_deficit = None, -math.inf
        for d, queue in enumerate(self.queues):
            if self.single_pass and queue.is_first_epoch_over:
                continue
            deficit = self.weights[d] * total - tokens[d] + self.initial_deficits[d]
            if deficit > best_deficit:
                best, best_deficit = d, deficit
        return best

    def _has_target(self, document: Document) -> bool:
        """Return whether one of the document's first L pairs counts in the loss."""
        if document.loss_mask is None:
            return document.num_pairs > 0
        return bool(document.loss_mask[1 : self.seq_len + 1].any())


def extend_digest(before: str, segments: Sequence[Segment]) -> str:
    """Return the hash of a lane's sequences, 16 hex digits, after one more: of its tokens and which of them count."""
    digest = hashlib.blake2b(before.encode(), digest_size=8)
    for document, begin, end in segments:
        digest.update(f"{end - begin}".encode())
        digest.update(document.tokens[begin : end + 1].astype("<i8").tobytes())
        if document.loss_mask is not None:
            digest.update(document.loss_mask[begin : end + 1].astype("u1").tobytes())
    return digest.hexdigest()


def combine_digests(digests: Iterable[tuple[int, str]]) -> int:
    """Return a hash of lanes, given as their numbers and digests: below 2**64, and that of no lanes is 0.

    Those of two sets of lanes add up, modulo 2**64, to that of both.
    """
    hashes = (hashlib.blake2b(f"{number} {digest}".encode(), digest_size=8).digest() for number, digest in digests)
    return sum(int.from_bytes(value, "little") for value in hashes) % 2**64


def write_sequence(
    segments: Sequence[Segment],
    input_L: NDArray[np.int64],
    positions_L: NDArray[np.int64],
    labels_L: NDArray[np.int64],
    pad_token_id: int,
) -> None:
    """Write the segments of one sequence into the three arrays.

    Positions count from 0 in every segment, because torchtitan treats position 0 as the start of a document. This also
    holds for a segment that continues a text from the previous sequence: attention cannot reach back into that
    sequence, so a new document begins for the model. Labels are IGNORE_INDEX where the loss mask of the label's token
    is 0. The padding is a document of its own.

    Args:
        segments: parts of documents, from `Lane.next_sequence`.
        input_L: int64 [L], receives the token ids.
        positions_L: int64 [L], receives each token's position in its segment.
        labels_L: int64 [L], receives the next token's id, or IGNORE_INDEX.
        pad_token_id: token id of the padding.
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


def compute_initial_deficits(domains: Sequence[Domain], weights: Sequence[float], num_lanes: int) -> list[list[float]]:
    """Return the initial deficit of each domain in each lane: the tokens that the domain is below its share.

    The result is indexed by lane, then by domain. Lanes that all began with deficits of 0 would draw the same domains
    at the same time: one batch would hold only web, the next one only math. So each lane begins at another point of a
    simulated run of one lane. In the simulation every document has its domain's mean length. The lanes' points are
    spread evenly over one cycle, the number of tokens from one document of the rarest domain to the next, but at most
    those of MAX_SIMULATED_DOCUMENTS. Lane 0 begins with deficits of 0.
    """
    means = [domain.mean_tokens for domain in domains]
    documents_per_token = sum(weight / mean for mean, weight in zip(means, weights, strict=True))
    cycle = max(mean / weight for mean, weight in zip(means, weights, strict=True))
    # A share of one in a billion would take as many documents until its domain's turn comes.
    cycle = min(cycle, MAX_SIMULATED_DOCUMENTS / documents_per_token)
    tokens, total = [0.0] * len(domains), 0.0
    initial_deficits: list[list[float]] = []
    while len(initial_deficits) < num_lanes:
        deficits = [weight * total - t for weight, t in zip(weights, tokens, strict=True)]
        d = deficits.index(max(deficits))
        tokens[d] += means[d]
        total += means[d]
        while len(initial_deficits) < num_lanes and cycle * len(initial_deficits) / num_lanes < total:
            initial_deficits.append(deficits)
    return initial_deficits
