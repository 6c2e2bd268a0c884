"""One domain of a stage: the documents of an MDS folder in a shuffled order that never ends.

`titan_ext.loader.order` says which document is next, and `titan_ext.loader.shard_store` fetches and reads the shards.
Shape legend: n tokens of a document.
"""

import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.errors import DamagedData, RefusedInput
from titan_ext.loader.order import WINDOW_SHARDS, EpochOrder, Place, ShareOrder
from titan_ext.loader.shard_store import ShardStore

log = logging.getLogger(__name__)


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


class Domain:
    """The documents of one MDS folder. Sections read them through queues of their own (`open_queue`)."""

    def __init__(self, name: str, store: ShardStore, *, seed: int, num_sections: int):
        """Count the documents.

        Args:
            name: name of the domain. It is part of the seed.
            store: reads the shards.
            seed: seed of the order of documents.
            num_sections: number of shares that each epoch is cut into (`order.count_sections`).

        Raises:
            RefusedInput: the folder has no document.
        """
        self.name = name
        self.source = store.source
        self.store = store
        index = store.index
        self.num_documents = int(index.samples.sum())
        if self.num_documents == 0:
            raise RefusedInput(f"domain {name!r} ({store.source}) has no documents: leave it out of the mixture")
        self.num_bytes = int(index.raw_bytes.sum())
        self.largest_shard_bytes = int(index.raw_bytes.max())
        # The seed includes the name, and not a number of the domain, so that the order of a domain's documents stays
        # the same when another domain is added.
        self._seed = (seed, zlib.crc32(name.encode()))
        self._num_sections = num_sections
        self._order = lru_cache(maxsize=4)(self._make_order)
        self._reported_epoch = 0

    @property
    def mean_tokens(self) -> float:
        """Return the mean number of tokens in a document, estimated from the sizes in index.json.

        A token takes 4 bytes (uint32). In a conversation its loss mask takes 1 more byte (uint8).
        """
        return self.num_bytes / self.num_documents / (5 if "loss_mask" in self.store.index.column_names else 4)

    def open_queue(self, section: int, place: Place, *, fetch_ahead: bool) -> "DocumentQueue":
        """Return the queue of a section's documents from `place` on."""
        return DocumentQueue(self, section, place, fetch_ahead=fetch_ahead)

    def take_share(self, section: int, epoch: int) -> ShareOrder:
        """Return the order of a section's share of an epoch."""
        return self._order(epoch).take_share(section)

    def report_epoch(self, epoch: int) -> None:
        """Log that an epoch begins, the first time that a section of this process begins it."""
        if epoch > self._reported_epoch:
            log.warning("domain %s: epoch %d begins, its documents repeat", self.name, epoch + 1)
            self._reported_epoch = epoch

    def read_document(self, shard: int, index: int) -> Document:
        """Read one document.

        Raises:
            DamagedData: the shard is damaged and cannot be fetched again, or a loss mask has another length than its
                tokens.
            OSError: the disk of the cache is full.
        """
        sample = self.store.read(shard, index)
        document = Document(sample["tokens"], sample.get("loss_mask"))
        if document.loss_mask is not None and len(document.loss_mask) != len(document.tokens):
            raise DamagedData(
                f"sample {index} of {self.store.path(shard)} has {len(document.tokens)} tokens but a loss_mask of "
                f"{len(document.loss_mask)}; they must be equally long: write the shards again"
            )
        return document

    def scan_documents(self) -> Iterator[Document]:
        """Yield every document once, in the order of the shards."""
        for shard, size in enumerate(self.store.index.samples):
            for index in range(size):
                yield self.read_document(shard, index)

    def _make_order(self, epoch: int) -> EpochOrder:
        index = self.store.index
        return EpochOrder(index.samples, index.raw_bytes, self._num_sections, (*self._seed, epoch))


class DocumentQueue:
    """The documents of one domain that one section draws, through all epochs.

    Attributes:
        domain: the domain.
        place: place of the next document; it may lie behind the last document of its epoch's share.
        num_drawn: number of documents drawn from this queue.
        held: numbers of the shards that are in use or fetched ahead.
    """

    def __init__(self, domain: Domain, section: int, place: Place, *, fetch_ahead: bool):
        self.domain = domain
        self.place = place
        self.num_drawn = 0
        self.held: list[int] = []
        self._section, self._fetch_ahead = section, fetch_ahead
        self._share = domain.take_share(section, place.epoch)
        self._slot = -1
        if place.position < self._share.num_documents:
            self._enter_slot(place)

    @property
    def is_first_epoch_over(self) -> bool:
        """Return whether every document of the first epoch's share was drawn."""
        return self.place.epoch > 0 or self.place.position == self._share.num_documents

    def draw(self) -> tuple[Place, Document]:
        """Return the next document and its place.

        Raises:
            DamagedData, OSError: as `Domain.read_document`.
        """
        place = self.place
        while place.position == self._share.num_documents:  # a share may be empty where documents are few
            place = Place(place.epoch + 1, 0)
            self.domain.report_epoch(place.epoch)
            self._share, self._slot = self.domain.take_share(self._section, place.epoch), -1
        self.place, self.num_drawn = Place(place.epoch, place.position + 1), self.num_drawn + 1
        self._enter_slot(place)
        return place, self._read(self._share, place)

    def read(self, place: Place) -> Document:
        """Return a document that was drawn before."""
        is_present = place.epoch == self.place.epoch
        return self._read(self._share if is_present else self.domain.take_share(self._section, place.epoch), place)

    def _read(self, share: ShareOrder, place: Place) -> Document:
        return self.domain.read_document(*share.locate(place.position))

    def _enter_slot(self, place: Place) -> None:
        """Start to fetch the shards of the slot of `place` and those ahead of it, unless the slot has begun before."""
        slot = self._share.find_slot(place.position)
        if slot == self._slot:
            return
        self._slot = slot
        self.held = self._share.list_shards(slot)
        if slot > self._share.num_slots - WINDOW_SHARDS:  # no shard of this share is left to enter
            self.held += self.domain.take_share(self._section, place.epoch + 1).list_first_shards()
        if self._fetch_ahead:
            self.domain.store.prefetch(self.held)
