"""One domain of a stage: the documents of an MDS folder in a shuffled order that never ends.

`titan_ext.loader.shard_store` fetches and reads the shards. Shape legend: S shards of the folder, n tokens of a
document.
"""

import logging
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.errors import DamagedData, RefusedInput
from titan_ext.loader.shard_store import ShardStore

log = logging.getLogger(__name__)

SHUFFLE_SHARDS = 16
"""Number of shards in a group. Documents are shuffled within a group only. This bounds the number of shards in use at
the same time, and the memory that the order takes."""
CACHED_GROUPS = 32
"""Number of groups whose permutation is kept in memory, for each epoch in use."""


@dataclass(frozen=True)
class Document:
    """One document: a plain text or a conversation."""

    tokens: NDArray[np.uint32]
    """Token ids, [n]."""
    loss_mask: NDArray[np.uint8] | None
    """1 where a token of a conversation is a target of the loss, else 0, [n]. None for plain text, which has targets
    only."""

    @property
    def num_pairs(self) -> int:
        """Number of (input, label) pairs: n - 1 in a document of n tokens."""
        return max(len(self.tokens) - 1, 0)


class EpochOrder:
    """A permutation of one epoch's documents: shards in random order, documents shuffled within groups of shards.

    A group is permuted when one of its documents is requested for the first time. The shuffles of mosaicml-streaming
    build the permutation of a whole epoch in one call. That takes 0.26 s for a million documents, and a process would
    need 25 minutes and 48 GB for the paper's six billion.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], seed: tuple[int, ...]):
        """Draw the order of the shards.

        Args:
            shard_sizes: number of documents in each shard, [S].
            seed: seed of all random draws of this epoch.
        """
        self._sizes = shard_sizes
        self._seed = seed
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes)])
        self._shards = np.random.default_rng(seed).permutation(len(shard_sizes))
        group_sizes = np.add.reduceat(shard_sizes[self._shards], np.arange(0, len(shard_sizes), SHUFFLE_SHARDS))
        self._group_starts = np.concatenate([[0], np.cumsum(group_sizes)])
        self._groups: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """Return (shard, index within the shard) of the document at `position` of this epoch."""
        group = self.find_group(position)
        document = self._permute_cached(group)[position - self._group_starts[group]]
        shard = bisect_right(self._starts, document) - 1
        return shard, int(document - self._starts[shard])

    def find_group(self, position: int) -> int:
        """Return the group of shards that the document at `position` is in."""
        return bisect_right(self._group_starts, position) - 1

    def list_shards(self, first: int, last: int) -> list[int]:
        """Return the shards of the groups `first` to `last` - 1; groups past the end of the epoch have none."""
        return self._shards[first * SHUFFLE_SHARDS : last * SHUFFLE_SHARDS].tolist()

    def _permute_cached(self, group: int) -> NDArray[np.int64]:
        """Return the permuted documents of a group, and keep those of the groups used last."""
        if group not in self._groups:
            self._groups[group] = self._permute(group)
        self._groups.move_to_end(group)
        if len(self._groups) > CACHED_GROUPS:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _permute(self, group: int) -> NDArray[np.int64]:
        shards = self._shards[group * SHUFFLE_SHARDS : (group + 1) * SHUFFLE_SHARDS]
        documents = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return np.random.default_rng((*self._seed, group)).permutation(documents)


class Domain:
    """A domain reads the documents of one MDS folder, which are numbered through all epochs."""

    def __init__(self, name: str, source: str, cache: Path, *, seed: int, cache_bytes: int):
        """Read the folder's index.json.

        Args:
            name: name of the domain. It is part of the seed.
            source: the MDS folder, a path or an address; see `ShardStore`.
            cache: folder for decompressed shards.
            seed: seed of the order of documents.
            cache_bytes: limit for the raw shards in `cache`, in bytes.

        Raises:
            RefusedInput: the folder cannot be read (see `ShardStore`) or has no document.
        """
        self.name = name
        self.source = source
        self.store = ShardStore(name, source, cache, cache_bytes)
        self.num_documents = int(self.store.sizes.sum())
        if self.num_documents == 0:
            raise RefusedInput(f"domain {name!r} ({source}) has no documents: leave it out of the mixture")
        # The seed includes the name, and not a number of the domain, so that the order of a domain's documents stays
        # the same when another domain is added.
        make_order = partial(_make_epoch_order, self.store.sizes, seed, zlib.crc32(name.encode()))
        self._order: Callable[[int], EpochOrder] = lru_cache(maxsize=8)(make_order)
        self._prefetched = (-1, -1)
        """Last epoch and group of shards whose prefetching was started."""

    @property
    def num_bytes(self) -> int:
        """Return the uncompressed size of all shards, in bytes."""
        return self.store.num_bytes

    @property
    def mean_tokens(self) -> float:
        """Return the mean number of tokens in a document, estimated from the sizes in index.json.

        A token takes 4 bytes (uint32). In a conversation its loss mask takes 1 more byte (uint8).
        """
        return self.num_bytes / self.num_documents / (5 if "loss_mask" in self.store.column_names else 4)

    def read_document(self, number: int) -> Document:
        """Return document `number` of the domain's endless order, in which every epoch is a new permutation.

        Raises:
            DamagedData: the shard is damaged and cannot be fetched again, or a loss mask has another length than its
                tokens.
            OSError: the disk of the cache is full.
        """
        epoch, position = divmod(number, self.num_documents)
        order = self._order(epoch)
        self._prefetch(epoch, order, order.find_group(position))
        shard, index = order.locate(position)
        sample = self.store.read(shard, index)
        document = Document(sample["tokens"], sample.get("loss_mask"))
        if document.loss_mask is not None and len(document.loss_mask) != len(document.tokens):
            raise DamagedData(
                f"sample {index} of {self.store.path(shard)} has {len(document.tokens)} tokens but a loss_mask of "
                f"{len(document.loss_mask)}; they must be equally long: write the shards again"
            )
        return document

    def _prefetch(self, epoch: int, order: EpochOrder, group: int) -> None:
        """Start to fetch a group's shards and the next group's, when the first document of the group is read."""
        if (epoch, group) > self._prefetched:
            if epoch > max(self._prefetched[0], 0):
                log.warning("domain %s: epoch %d begins, its documents repeat", self.name, epoch + 1)
            self._prefetched = (epoch, group)
            self.store.prefetch(order.list_shards(group, group + 2))


def list_domains(shards: str) -> list[str]:
    """Return the names of the MDS folders directly below the stage folder `shards` (a local path), sorted."""
    return sorted(path.parent.name for path in Path(shards).glob("*/index.json"))


def _make_epoch_order(sizes: NDArray[np.int64], seed: int, domain: int, epoch: int) -> EpochOrder:
    return EpochOrder(sizes, (seed, domain, epoch))
