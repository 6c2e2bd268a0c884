"""One domain of a stage: an MDS folder's documents in a shuffled order without end.

How its shards get here is `titan_ext.loader.shard_store`'s matter.
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

from core.errors import RefusedInput
from titan_ext.loader.shard_store import ShardStore

log = logging.getLogger(__name__)

SHUFFLE_SHARDS = 16
"""Shards whose documents are shuffled among each other; bounds the shards in use and the memory of the order."""
CACHED_GROUPS = 32


@dataclass(frozen=True)
class Document:
    """`tokens` uint32 [n]; `loss_mask` uint8 [n] marks a conversation (None: plain text), 1 where a token is a
    target.
    """

    tokens: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8] | None

    @property
    def num_pairs(self) -> int:
        """(input, label) pairs: a document of n tokens has n - 1."""
        return max(len(self.tokens) - 1, 0)


class EpochOrder:
    """A permutation of one epoch's documents: shards in random order, documents shuffled within groups of shards.

    Groups are permuted when first asked for. streaming's own shuffles build the whole epoch's permutation instead,
    which takes 0.26 s and tens of bytes a million documents: 25 minutes and 48 GB a process at the paper's six
    billion.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], seed: tuple[int, ...]):
        """`shard_sizes` int64 [S], documents a shard; `seed` fixes the order."""
        self._sizes = shard_sizes
        self._seed = seed
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes)])
        self._shards = np.random.default_rng(seed).permutation(len(shard_sizes))
        group_sizes = np.add.reduceat(shard_sizes[self._shards], np.arange(0, len(shard_sizes), SHUFFLE_SHARDS))
        self._group_starts = np.concatenate([[0], np.cumsum(group_sizes)])
        self._groups: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index within the shard) of the document at `position` of this epoch."""
        group = self.group_of(position)
        document = self._group(group)[position - self._group_starts[group]]
        shard = bisect_right(self._starts, document) - 1
        return shard, int(document - self._starts[shard])

    def _group(self, group: int) -> NDArray[np.int64]:
        """Documents of a group in their order; the groups asked for last are kept."""
        if group not in self._groups:
            self._groups[group] = self._permute(group)
        self._groups.move_to_end(group)
        if len(self._groups) > CACHED_GROUPS:
            self._groups.popitem(last=False)
        return self._groups[group]

    def group_of(self, position: int) -> int:
        """Which group of shards the document at `position` is in."""
        return bisect_right(self._group_starts, position) - 1

    def shards_of(self, first: int, last: int) -> list[int]:
        """Shards of the groups `first` to `last` - 1, as far as there are any."""
        return self._shards[first * SHUFFLE_SHARDS : last * SHUFFLE_SHARDS].tolist()

    def _permute(self, group: int) -> NDArray[np.int64]:
        shards = self._shards[group * SHUFFLE_SHARDS : (group + 1) * SHUFFLE_SHARDS]
        documents = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return np.random.default_rng((*self._seed, group)).permutation(documents)


class Domain:
    """The documents of one MDS folder, numbered through all epochs.

    Arguments and refusals as of `ShardStore`; a folder without a document is refused too.
    """

    def __init__(self, name: str, source: str, cache: Path, *, seed: int, cache_bytes: int):
        self.name = name
        self.source = source
        self.store = ShardStore(name, source, cache, cache_bytes)
        self.num_documents = int(self.store.sizes.sum())
        if self.num_documents == 0:
            raise RefusedInput(f"domain {name!r} ({source}) has no documents: leave it out of the mixture")
        # The name is part of the seed: adding a domain leaves the order of the others as it is.
        make_order = partial(_epoch_order, self.store.sizes, seed, zlib.crc32(name.encode()))
        self._order: Callable[[int], EpochOrder] = lru_cache(maxsize=8)(make_order)
        self._furthest = (-1, -1)
        """Epoch and group of shards that the workers were last asked for."""

    @property
    def num_bytes(self) -> int:
        """Uncompressed size of all shards."""
        return self.store.num_bytes

    @property
    def mean_tokens(self) -> float:
        """Tokens of a document on average, from the sizes in the index: 4 bytes a token and 1 for its loss mask."""
        return self.num_bytes / self.num_documents / (5 if "loss_mask" in self.store.column_names else 4)

    def document(self, number: int) -> Document:
        """The `number`-th document of the domain's epochs laid end to end, each a permutation of all documents.

        Raises RefusedInput where the shard is damaged and cannot be fetched again, or a loss mask has another length.
        """
        epoch, position = divmod(number, self.num_documents)
        order = self._order(epoch)
        self._fetch_ahead(epoch, order, order.group_of(position))
        shard, index = order.locate(position)
        sample = self.store.read(shard, index)
        document = Document(sample["tokens"], sample.get("loss_mask"))
        if document.loss_mask is not None and len(document.loss_mask) != len(document.tokens):
            raise RefusedInput(
                f"sample {index} of {self.store.path(shard)} has {len(document.tokens)} tokens but a loss_mask of "
                f"{len(document.loss_mask)}; they must be equally long: write the shards again"
            )
        return document

    def _fetch_ahead(self, epoch: int, order: EpochOrder, group: int) -> None:
        """Ask the workers for the shards of a group that no document was read of before, and for the next group's."""
        if (epoch, group) > self._furthest:
            if epoch > max(self._furthest[0], 0):
                log.warning("domain %s: epoch %d begins, its documents repeat", self.name, epoch + 1)
            self._furthest = (epoch, group)
            self.store.prefetch(order.shards_of(group, group + 2))


def list_domains(shards: str) -> list[str]:
    """Names of the MDS folders directly under the stage folder `shards` (a local path), sorted."""
    return sorted(path.parent.name for path in Path(shards).glob("*/index.json"))


def _epoch_order(sizes: NDArray[np.int64], seed: int, domain: int, epoch: int) -> EpochOrder:
    return EpochOrder(sizes, (seed, domain, epoch))
