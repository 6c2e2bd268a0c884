"""The order of a domain's documents: epochs, shares of an epoch, slots of a share.

The lanes of a global batch are divided into sections (`count_sections`). An epoch of a domain is a random order of its
shards, cut into one share for each section, equal in bytes. A section reads its share slot by slot. Slot x has a part
of each of the last WINDOW_SHARDS shards of the share up to number x, so a shard is in use for WINDOW_SHARDS slots in a
row and never again in that epoch, whatever the lengths of the documents are. This bounds the shards in use by
construction.

It imports numpy alone: the check of a recipe uses it too. Shape legend: S shards of a domain, K sections, P shards of a
share.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_SECTIONS = 32
"""Largest number of sections, and so of nodes that each read shards of their own. More sections need a larger cache
where few nodes hold them all."""
WINDOW_SHARDS = 4
"""Number of shards that a section's documents of a domain are drawn from at the same time."""
AHEAD_SHARDS = 1
"""Number of shards that a section fetches before they are in use: the one that enters with the next slot."""
LEFT_SHARDS = 1
"""Number of shards that a section has left and that stay in the cache for the ranks that are micro-batches behind."""
HELD_SHARDS = WINDOW_SHARDS + AHEAD_SHARDS + LEFT_SHARDS
"""Number of shards of a domain that a section keeps in the cache."""


def count_sections(global_batch_size: int) -> int:
    """Return the number of sections of a global batch: the largest divisor that is at most MAX_SECTIONS.

    It depends on the global batch alone, so that every number of ranks has the same order.
    """
    return max(number for number in range(1, MAX_SECTIONS + 1) if global_batch_size % number == 0)


def list_sections(global_batch_size: int, ranks: int, first: int, last: int) -> range:
    """Return the sections that the data-parallel ranks `first` to `last` - 1 of `ranks` have lanes of.

    Rank r has the lanes r G / R to (r + 1) G / R - 1, and a section consists of G / K lanes in a row.
    """
    lanes = global_batch_size // count_sections(global_batch_size)
    rows = global_batch_size // ranks
    return range(first * rows // lanes, -(-last * rows // lanes))


def sum_held_bytes(sections: int, domains: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of raw shards that a number of sections keep in the cache.

    Args:
        domains: bytes of the largest raw shard, and of all raw shards, of every domain.
    """
    return sum(min(sections * HELD_SHARDS * largest, total) for largest, total in domains)


class Place(NamedTuple):
    """The place of a document in a section's order of one domain."""

    epoch: int
    position: int
    """Number of the document in the section's share of that epoch."""


BEGIN = Place(0, 0)
"""Place of a section's first document."""


class ShareOrder:
    """The order of one section's share of an epoch; see the module's docstring.

    Attributes:
        num_documents: number of documents of the share.
        num_slots: number of slots, P + WINDOW_SHARDS - 1; 0 in an empty share.
    """

    def __init__(
        self, shards: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64], seed: tuple[int, ...]
    ):
        """Compute the sizes of the slots.

        Args:
            shards: number of each shard, [P].
            begins: first document of each shard that belongs to the share, [P].
            ends: the document after the last one, [P].
            seed: seed of all random draws of this share.
        """
        self._shards, self._begins, self._ends, self._seed = shards, begins, ends, seed
        sizes = ends - begins
        self.num_slots = len(shards) + WINDOW_SHARDS - 1 if len(shards) else 0
        slot_sizes = np.zeros(self.num_slots, np.int64)
        for part in range(WINDOW_SHARDS if len(shards) else 0):
            low, high = _cut_part(sizes, part)
            slot_sizes[part : part + len(shards)] += high - low
        self._starts = np.concatenate([[0], np.cumsum(slot_sizes)])
        self.num_documents = int(self._starts[-1])
        self._permute_cached = lru_cache(maxsize=2)(self._permute)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, index within the shard) of the document at `position` of the share."""
        slot = self.find_slot(position)
        shard, index = self._permute_cached(slot)[position - self._starts[slot]]
        return int(shard), int(index)

    def find_slot(self, position: int) -> int:
        """Return the slot that the document at `position` is in."""
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def list_shards(self, slot: int) -> list[int]:
        """Return the shards in use in a slot, and those that are to be fetched ahead during it."""
        return self._shards[max(slot - WINDOW_SHARDS + 1, 0) : slot + 1 + AHEAD_SHARDS].tolist()

    def list_first_shards(self) -> list[int]:
        """Return the shards that are to be fetched before the share begins."""
        return self._shards[: 1 + AHEAD_SHARDS].tolist()

    def _permute(self, slot: int) -> NDArray[np.int64]:
        """Return (shard, index within the shard) of the documents of a slot in their order, [documents, 2]."""
        parts = []
        for part in range(WINDOW_SHARDS):
            place = slot - part
            if 0 <= place < len(self._shards):
                low, high = _cut_part(self._ends[place] - self._begins[place], part)
                documents = np.random.default_rng((*self._seed, 0, place)).permutation(
                    np.arange(self._begins[place], self._ends[place])
                )[low:high]
                parts.append(np.stack([np.full(len(documents), self._shards[place]), documents], axis=1))
        return np.random.default_rng((*self._seed, 1, slot)).permutation(np.concatenate(parts))


class EpochOrder:
    """The order of one epoch of a domain: its shards in random order, cut into a share for every section."""

    def __init__(
        self, sizes: NDArray[np.int64], shard_bytes: NDArray[np.int64], num_sections: int, seed: tuple[int, ...]
    ):
        """Draw the order of the shards and cut it.

        Lengths of documents are known only when their shard is there, but the shards' bytes are known before. A cut
        within a shard takes its documents for equally long.

        Args:
            sizes: number of documents of each shard, [S].
            shard_bytes: uncompressed size of each shard, [S].
            num_sections: K.
            seed: seed of all random draws of this epoch.
        """
        rng = np.random.default_rng(seed)
        self._shards = rng.permutation(len(sizes))
        # With fewer shards than sections a share would be the same part of a shard in every epoch.
        self._shift = int(rng.integers(num_sections))
        self._sizes, self._num_sections, self._seed = sizes, num_sections, seed
        ordered_bytes = np.asarray(shard_bytes[self._shards], np.int64)
        byte_ends = np.cumsum(ordered_bytes)
        targets = [int(byte_ends[-1]) * number // num_sections for number in range(num_sections + 1)]
        # The cut before share i is in the shard `_cut_shards[i]` of the order, before its document `_cut_documents[i]`.
        self._cut_shards = np.searchsorted(byte_ends, targets, side="right")
        self._cut_documents = [
            (target - int(byte_ends[at] - ordered_bytes[at])) * int(sizes[self._shards[at]]) // int(ordered_bytes[at])
            if at < len(sizes)
            else 0
            for target, at in zip(targets, self._cut_shards, strict=True)
        ]

    def take_share(self, section: int) -> ShareOrder:
        """Return the order of a section's share."""
        share = (section + self._shift) % self._num_sections
        (first, last), (low, high) = self._cut_shards[share : share + 2], self._cut_documents[share : share + 2]
        shards = self._shards[first : last + (high > 0)]
        begins, ends = np.zeros(len(shards), np.int64), np.array(self._sizes[shards], np.int64)
        if len(shards):
            begins[0] = low
            ends[-1] = high or ends[-1]
        kept = ends > begins
        return ShareOrder(shards[kept], begins[kept], ends[kept], (*self._seed, share))


def _cut_part(size: NDArray[np.int64], part: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where part `part` of WINDOW_SHARDS equal parts of `size` documents begins and ends."""
    return size * part // WINDOW_SHARDS, size * (part + 1) // WINDOW_SHARDS
