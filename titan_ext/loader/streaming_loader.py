"""This module is torchtitan's dataloader for MDS shards.

It keeps the mixture exact in tokens, packs documents, and yields the same order on any number of ranks.
`titan_ext.loader.domain` reads the documents from the shards, the sections of `titan_ext.loader.section` pack them into
sequences, and this module puts the sequences together into micro-batches.

Shape legend: B sequences of a micro-batch (torchtitan's local batch), L tokens of a sequence, G sequences of a global
batch, R data-parallel ranks, K sections.
"""

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from core.errors import RefusedInput
from titan_ext.loader.config_checks import check_batch_shape, check_cache, check_tokenizer
from titan_ext.loader.mixture import open_domains, resolve_mixture
from titan_ext.loader.order import count_sections, list_sections, sum_held_bytes
from titan_ext.loader.packing import Segment, combine_digests, compute_initial_deficits, write_sequence
from titan_ext.loader.realign import REALIGNABLE, Realignment, check_order
from titan_ext.loader.section import Section, SectionState
from titan_ext.loader.shard_store import default_cache

log = logging.getLogger(__name__)

PREFETCH_BATCHES = 4
"""Number of micro-batches prepared ahead of the training loop."""
KEEP_SECONDS = 10
"""Time after which the shards in use are marked as used again."""
ORDER_VERSION = 2
"""Number of the order of documents. A state of another order is refused. In order 1 every lane drew by itself."""


class _Batch(NamedTuple):
    """One micro-batch, and where it leaves the sections."""

    inputs: dict[str, torch.Tensor]
    labels_BL: torch.Tensor
    states: dict[int, SectionState]
    """Section -> its state after this batch. Empty within a global batch: a section's state is that between two."""


class StreamingLoader(BaseDataLoader):
    """The loader yields ({"input": int64 [B, L], "positions": int64 [B, L]}, labels int64 [B, L]).

    Labels are -100 where the position has no part in the loss.

    Rank r has the sequences r * G / R to (r + 1) * G / R - 1 of every global batch, and takes B of them in a
    micro-batch. So the global batch, in the order rank, micro-batch, row, is the same for every R and B. With
    `infinite=False` every document comes once, in the order micro-batch, rank, row. The last micro-batch is then filled
    up with sequences of padding, and all ranks stop after the same number of micro-batches.

    `iter()` continues after the last batch taken; batches that were prefetched beyond it are prepared again. After the
    end of a finite pass it begins the next pass. Only the newest iterator may be used.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        shards: str
        """Folder or address of a stage, with one MDS folder for each domain."""
        local: str = ""
        """Cache folder for shards that are remote or compressed. Empty: a folder below the machine's temporary
        directory.
        """
        mixture: dict[str, float] = field(default_factory=dict)
        """Domain -> share of the tokens; the shares sum to 1. Empty: all domains of a local folder, in proportion to
        their size in bytes."""
        global_batch_size: Annotated[int, tyro.conf.Suppress] = 0
        """Number of sequences per step over all ranks, G. The trainer sets it from the training config."""
        seed: int = 0
        """Seed of the order of documents."""
        pad_token_id: int
        infinite: bool = True
        """Go through the documents again and again; otherwise make one pass."""
        cache_bytes: int = 64 << 30
        """Limit for the raw shards in `local`, over all domains, in bytes. The shards not used for the longest time are
        deleted first."""
        realign_after: Annotated[int | None, tyro.conf.Suppress] = None
        """Number of sequences, over all ranks, after which another mixture or other shards may take over from a saved
        state (`titan_ext.loader.realign`). None: a state of other data is refused."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        tokenizer: BaseTokenizer | None = None,
        snapshot_every_n_steps: int | None = None,
    ):
        """Open the domains and check the configuration.

        Args:
            config: the loader's configuration.
            dp_world_size: number of data-parallel ranks, R.
            dp_rank: this rank, from 0 to R - 1.
            seq_len: number of tokens of a sequence, L.
            local_batch_size: number of sequences of a micro-batch, B.
            tokenizer: tokenizer of the run; it must be the one that made the shards. None: it is not checked.
            snapshot_every_n_steps: ignored. torchtitan gives it to every loader, but this loader's state is exact after
                every batch.

        Raises:
            RefusedInput: the configuration or the shards cannot be used for training; the message names the field.
        """
        assert 0 <= dp_rank < dp_world_size, (dp_rank, dp_world_size)
        check_batch_shape(config.global_batch_size, dp_world_size, local_batch_size, seq_len)
        cache = Path(config.local) if config.local else default_cache()
        check_cache(cache, config.cache_bytes, config.shards)
        self._config = config
        self._dp_world_size, self._dp_rank, self._seq_len, self._local_batch_size = (
            dp_world_size, dp_rank, seq_len, local_batch_size,
        )  # fmt: skip
        # A finite pass has one lane, which every rank packs. So all ranks agree on its end without communication.
        self._num_lanes = config.global_batch_size if config.infinite else 1
        self._num_sections = count_sections(self._num_lanes)
        self._domains = open_domains(
            config.shards,
            config.mixture,
            cache,
            cache_bytes=config.cache_bytes,
            seed=config.seed,
            num_sections=self._num_sections,
        )
        check_tokenizer(self._domains, tokenizer)
        self._mixture = resolve_mixture(config.mixture, self._domains)
        self._fetch_ahead = config.cache_bytes >= self.estimate_cache_bytes(node_ranks=1)
        if not self._fetch_ahead:
            log.warning(
                "cache_bytes is %d, and the shards in use and ahead take %d: shards are fetched only when needed",
                config.cache_bytes,
                self.estimate_cache_bytes(node_ranks=1),
            )
        self._packer = _new_packer()
        self._states: dict[int, SectionState] = {}
        self._rewind()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._end_iteration()
        return self._iterate(self._packer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch taken.

        It has one entry for each section of which this rank has lanes, and entries that are the same on all ranks.
        torch.distributed.checkpoint merges the entries of all ranks by their keys. A run on another number of ranks
        loads the entries of its own sections.
        """
        sections = {self._name_section(k): json.dumps(state.to_dict()) for k, state in self._states.items()}
        return {
            "sequences": self._sequences,
            "ranks": self._dp_world_size,
            "identity": json.dumps(self._describe_order()),
            **sections,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was taken. An empty state means the beginning.

        Raises:
            RefusedInput: the state belongs to other data or another batch shape; the message names the difference.
        """
        self._end_iteration()
        self._rewind()
        if not state_dict:
            return
        saved, own = json.loads(state_dict["identity"]), self._describe_order()
        realigns = state_dict["sequences"] == self._config.realign_after and saved != own
        check_order(saved, own, REALIGNABLE if realigns else ())
        self._check_begin(state_dict["sequences"], state_dict["ranks"])
        missing = [key for key in map(self._name_section, self._states) if key not in state_dict]
        if missing:
            raise RefusedInput(f"the loader's state lacks {missing[0]}: merge the states of all ranks it was taken on")
        self._sequences = state_dict["sequences"]
        realignment = Realignment.between(saved, own) if realigns else None
        for k in self._states:
            state = SectionState.from_dict(json.loads(state_dict[self._name_section(k)]))
            self._states[k] = realignment.realign(state) if realignment else state

    def estimate_cache_bytes(self, node_ranks: int) -> int:
        """Return the bytes of raw shards that the ranks of this node keep in the cache.

        Args:
            node_ranks: number of data-parallel ranks on this node, which follow one another.
        """
        stores = [(d.largest_shard_bytes, d.num_bytes) for d in self._domains if not d.store.is_in_place]
        first = self._dp_rank // node_ranks * node_ranks
        last = min(first + node_ranks, self._dp_world_size)
        sections = list_sections(self._num_lanes, self._dp_world_size, first, last) if self._config.infinite else [0]
        return sum_held_bytes(len(sections), stores)

    def statistics(self) -> dict[str, Any]:
        """Count what the sections of this rank have yielded since the first step of the stage, resumes included.

        Sections that several ranks share are counted by each of them. In a finite pass the counts are those of all
        ranks, because every rank packs the only lane.

        Returns:
            {"sequences", "padding": share of the positions, "truncated" and "skipped": documents, "tokens": {domain:
            positions}, "epochs": {domain: documents drawn by all sections, estimated from this rank's, divided by the
            domain's number of documents}}.
        """
        sections = list(self._states.values())
        lanes = [lane for section in sections for lane in section.lanes]
        total: Counter[str] = Counter()
        for lane in lanes:
            total.update(sequences=lane.sequences, padding=lane.padding, truncated=lane.truncated, skipped=lane.skipped)
        sections_per_own = self._num_sections / len(sections)
        return {
            "sequences": total["sequences"],
            "padding": total["padding"] / max(total["sequences"] * self._seq_len, 1),
            "truncated": total["truncated"],
            "skipped": total["skipped"],
            "tokens": {domain.name: sum(lane.tokens[d] for lane in lanes) for d, domain in enumerate(self._domains)},
            "epochs": {
                domain.name: sum(section.draws[d] for section in sections) * sections_per_own / domain.num_documents
                for d, domain in enumerate(self._domains)
            },
        }

    def hash_sequences(self) -> int:
        """Return this rank's part of the hash of all sequences since the first step of the stage, resumes included.

        The sum of all ranks' parts, modulo 2**64, is the same on any number of ranks. It changes with any token, its
        place, and whether it counts in the loss. It is that after the last global batch taken.
        """
        assert self._config.infinite, "every rank packs all sequences of a finite pass"
        own, lanes = self._num_lanes // self._dp_world_size, self._num_lanes // self._num_sections
        here = range(self._dp_rank * own, (self._dp_rank + 1) * own)
        states = ((k * lanes + i, lane) for k, state in self._states.items() for i, lane in enumerate(state.lanes))
        return combine_digests((number, lane.digest) for number, lane in states if number in here)

    def _rewind(self) -> None:
        """Set the state to the beginning: no batch was taken."""
        self._sequences, self._ended = 0, False
        lanes = self._num_lanes // self._num_sections
        self._states = {k: SectionState.begin(len(self._domains), lanes) for k in self._list_own_sections()}

    def _list_own_sections(self) -> range:
        """Return the numbers of the sections that this rank packs."""
        if not self._config.infinite:
            return range(1)
        return list_sections(self._num_lanes, self._dp_world_size, self._dp_rank, self._dp_rank + 1)

    def _name_section(self, section: int) -> str:
        """Return the key of a section's entry in the state."""
        # DCP refuses a checkpoint without this key. So the key says what is expected.
        return f"order_{ORDER_VERSION}_section_{section:02d}_of_{self._num_sections:02d}"

    def _check_begin(self, sequences: int, ranks: int) -> None:
        """Check that this rank can go on after `sequences` sequences, which `ranks` ranks took.

        Raises:
            RefusedInput: the state was taken within a global batch, of which this rank has no whole micro-batches left.
        """
        taken = sequences % self._config.global_batch_size if self._config.infinite else 0
        if taken and (ranks != self._dp_world_size or taken % (ranks * self._local_batch_size)):
            raise RefusedInput(
                f"the loader's state was taken after {sequences} sequences on {ranks} ranks, within a global batch; "
                f"{self._dp_world_size} ranks of local_batch_size {self._local_batch_size} cannot begin there. Resume "
                "with the ranks and local_batch_size of before, or from a checkpoint between two steps"
            )

    def _describe_order(self) -> dict[str, Any]:
        """Return all settings that the order of the sequences depends on. A state is valid for the same ones only."""
        return {
            "order": ORDER_VERSION,
            "seed": self._config.seed,
            "seq_len": self._seq_len,
            "global_batch_size": self._config.global_batch_size,
            "infinite": self._config.infinite,
            "mixture": self._mixture,
            "shards": {domain.name: domain.store.index.fingerprint for domain in self._domains},
        }

    def _end_iteration(self) -> None:
        """End the present iterator, if there is one, and drop the batches that were prepared for it."""
        self._packer.shutdown(wait=False, cancel_futures=True)
        self._packer = _new_packer()

    def _iterate(self, packer: ThreadPoolExecutor) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield batches that the thread of `packer` prepares, until the pass ends or `packer` is replaced."""
        if self._ended:
            self._rewind()
        sections = self._build_sections()
        if self._config.infinite:
            source = self._pack_endlessly(sections, self._sequences)
        else:
            source = self._pack_single_pass(sections[0])
        ahead: deque[Future[_Batch | None]] = deque()
        try:
            while True:
                if packer is not self._packer:
                    raise RuntimeError("this iterator is over: the loader has a newer one, or has loaded a state since")
                while len(ahead) <= PREFETCH_BATCHES:
                    ahead.append(packer.submit(next, source, None))
                batch = ahead.popleft().result()
                if batch is None:
                    self._ended = True
                    return
                # The state moves when a batch is taken and not when it is packed, so a checkpoint never skips the
                # batches that are still waiting.
                self._sequences += self._dp_world_size * self._local_batch_size
                self._states.update(batch.states)
                yield batch.inputs, batch.labels_BL
        finally:
            packer.shutdown(wait=False, cancel_futures=True)

    def _build_sections(self) -> dict[int, Section]:
        """Return this rank's sections where the present state leaves them."""
        weights = list(self._mixture.values())
        deficits = compute_initial_deficits(self._domains, weights, self._num_lanes)
        lanes = self._num_lanes // self._num_sections
        return {
            k: Section(
                k, self._domains, weights, self._seq_len, deficits[k * lanes : (k + 1) * lanes], state,
                single_pass=not self._config.infinite, fetch_ahead=self._fetch_ahead,
            )
            for k, state in self._states.items()
        }  # fmt: skip

    def _pack_endlessly(self, sections: dict[int, Section], sequences: int) -> Iterator[_Batch]:
        """Yield micro-batches without end. `sequences` is the number of sequences yielded before, over all ranks."""
        B, own = self._local_batch_size, self._num_lanes // self._dp_world_size
        taken = sequences % self._num_lanes // self._dp_world_size
        kept_at = time.monotonic()
        while True:
            rows = islice(self._pack_global_batch(sections), taken, None)
            for row in range(taken, own, B):
                micro_batch = list(islice(rows, B))
                # After this rank's last row, all of its sections stand at the end of the global batch.
                states = {k: section.state for k, section in sections.items()} if row + B == own else {}
                yield self._make_batch(micro_batch, states)
                if time.monotonic() > kept_at + KEEP_SECONDS:
                    self._keep_shards(sections)
                    kept_at = time.monotonic()
            taken = 0

    def _pack_global_batch(self, sections: dict[int, Section]) -> Iterator[list[Segment]]:
        """Yield this rank's sequences of the next global batch. Each of its sections packs all of its lanes."""
        own = self._num_lanes // self._dp_world_size
        first, lanes = self._dp_rank * own, self._num_lanes // self._num_sections
        for k, section in sections.items():
            for lane, segments in enumerate(section.next_sequences(), start=k * lanes):
                if first <= lane < first + own:
                    yield segments

    def _keep_shards(self, sections: dict[int, Section]) -> None:
        """Mark the shards in use and ahead as used. So the cache keeps those of a domain with a small share, too."""
        for section in sections.values():
            for domain, queue in zip(self._domains, section.queues, strict=True):
                domain.store.keep(queue.held)

    def _pack_single_pass(self, section: Section) -> Iterator[_Batch]:
        """Yield this rank's micro-batches of one pass. Every rank packs all sequences and keeps its own."""
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        while True:
            rows = [section.next_sequences()[0] for _ in range(R * B)]
            lane = section.state.lanes[0]
            if lane.sequences == 0:
                raise RefusedInput(
                    f"shards is {self._config.shards!r}: none of the {lane.skipped} documents of the domains "
                    f"{list(self._mixture)} has a token to train on within {self._seq_len} positions; a document needs "
                    "2 tokens, and a conversation one that its loss_mask marks"
                )
            # The lane has ended if the first row is empty. If only later rows are empty, they become padding.
            if not rows[0]:
                return
            yield self._make_batch(rows[r * B : (r + 1) * B], {0: section.state})

    def _make_batch(self, rows: list[list[Segment]], states: dict[int, SectionState]) -> _Batch:
        input_BL, positions_BL, labels_BL = np.empty((3, self._local_batch_size, self._seq_len), np.int64)
        for b, segments in enumerate(rows):
            write_sequence(segments, input_BL[b], positions_BL[b], labels_BL[b], self._config.pad_token_id)
        inputs = {"input": torch.from_numpy(input_BL), "positions": torch.from_numpy(positions_BL)}
        return _Batch(inputs, torch.from_numpy(labels_BL), states)


def _new_packer() -> ThreadPoolExecutor:
    """Return an executor with the one thread that packs batches ahead.

    It is an executor's thread and not a daemon thread for the reason given in
    `titan_ext.loader.shard_store._worker_pool`.
    """
    return ThreadPoolExecutor(1, thread_name_prefix="streaming-loader")
