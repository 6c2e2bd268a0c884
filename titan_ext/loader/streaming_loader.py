"""This module is torchtitan's dataloader for MDS shards.

It keeps the mixture exact in tokens, packs documents, and yields the same order on any number of ranks.
`titan_ext.loader.domain` reads the documents from the shards, a lane of `titan_ext.loader.packing` packs them into
sequences, and this module puts the sequences together into micro-batches. A lane is the stream of all sequences at one
row of the global batch.

Shape legend: B sequences of a micro-batch (torchtitan's local batch), L tokens of a sequence, G sequences of a global
batch, R data-parallel ranks.
"""

import json
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer

from core.errors import RefusedInput
from titan_ext.loader.config_checks import check_batch_shape, check_cache, check_domains, check_mixture, check_tokenizer
from titan_ext.loader.domain import Domain, list_domains
from titan_ext.loader.packing import Lane, LaneState, Segment, compute_initial_deficits, write_sequence
from titan_ext.loader.shard_store import default_cache, is_remote

PREFETCH_BATCHES = 4
"""Number of micro-batches prepared ahead of the training loop."""


class _Batch(NamedTuple):
    """One micro-batch, and the states of the lanes that packed it."""

    inputs: dict[str, torch.Tensor]
    labels_BL: torch.Tensor
    states: dict[int, LaneState]
    """Lane -> its state after this batch."""


class StreamingLoader(BaseDataLoader):
    """The loader yields ({"input": int64 [B, L], "positions": int64 [B, L]}, labels int64 [B, L]).

    Labels are -100 where the position has no part in the loss.

    Micro-batch a of a step on rank r holds B consecutive sequences of the global batch, from sequence (a * R + r) * B
    on. So the global batch, in the order micro-batch, rank, row, is the same for every R and B. With `infinite=False`
    every document comes once. The last micro-batch is then filled up with sequences of padding, and all ranks stop
    after the same number of micro-batches.

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
        check_cache(config.local, config.cache_bytes, config.shards)
        self._config = config
        self._dp_world_size, self._dp_rank, self._seq_len, self._local_batch_size = (
            dp_world_size, dp_rank, seq_len, local_batch_size,
        )  # fmt: skip
        self._domains = _open_domains(config)
        check_tokenizer(self._domains, tokenizer)
        self._mixture = _resolve_mixture(config, self._domains)
        # A finite pass has one lane, which every rank packs. So all ranks agree on its end without communication.
        self._num_lanes = config.global_batch_size if config.infinite else 1
        self._packer = _new_packer()
        self._rewind()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._end_iteration()
        return self._iterate(self._packer)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch taken.

        It has one entry for each lane of this rank, and two entries that are the same on all ranks.
        torch.distributed.checkpoint merges the entries of all ranks by their keys. A run on another number of ranks
        loads the entries of its own lanes.
        """
        lanes = {self._name_lane(j): json.dumps(asdict(self._states[j])) for j in self._list_own_lanes()}
        return {"sequences": self._sequences, "identity": json.dumps(self._describe_order()), **lanes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was taken. An empty state means the beginning.

        Raises:
            RefusedInput: the state belongs to other data or another batch shape; the message names the difference.
        """
        self._end_iteration()
        self._rewind()
        if not state_dict:
            return
        self._check_identity(json.loads(state_dict["identity"]))
        step = self._dp_world_size * self._local_batch_size
        if state_dict["sequences"] % step:
            raise RefusedInput(
                f"the loader's state was taken after {state_dict['sequences']} sequences, within a global batch; "
                f"{self._dp_world_size} ranks of local_batch_size {self._local_batch_size} take {step} at once and "
                "cannot begin there. Resume with the ranks and local_batch_size of before, or from a checkpoint "
                "between two steps"
            )
        missing = [key for key in map(self._name_lane, self._list_own_lanes()) if key not in state_dict]
        if missing:
            raise RefusedInput(f"the loader's state lacks {missing[0]}: merge the states of all ranks it was taken on")
        self._sequences = state_dict["sequences"]
        for j in self._list_own_lanes():
            self._states[j] = LaneState(**json.loads(state_dict[self._name_lane(j)]))

    def statistics(self) -> dict[str, Any]:
        """Count what this rank's lanes have yielded since the first step of the stage, resumes included.

        In a finite pass the counts are those of all ranks, because every rank packs the only lane.

        Returns:
            {"sequences", "padding": share of the positions, "truncated" and "skipped": documents, "tokens": {domain:
            positions}, "epochs": {domain: documents drawn by all lanes, estimated from this rank's, divided by the
            domain's number of documents}}.
        """
        states = [self._states[j] for j in self._list_own_lanes()]
        total: Counter[str] = Counter()
        for state in states:
            total.update(
                sequences=state.sequences, padding=state.padding, truncated=state.truncated, skipped=state.skipped
            )
        lanes_per_own = self._num_lanes / len(states)
        return {
            "sequences": total["sequences"],
            "padding": total["padding"] / max(total["sequences"] * self._seq_len, 1),
            "truncated": total["truncated"],
            "skipped": total["skipped"],
            "tokens": {domain.name: sum(s.tokens[d] for s in states) for d, domain in enumerate(self._domains)},
            "epochs": {
                domain.name: sum(s.draws[d] for s in states) * lanes_per_own / domain.num_documents
                for d, domain in enumerate(self._domains)
            },
        }

    def _rewind(self) -> None:
        """Set the state to the beginning: no batch was taken."""
        zeros = [0] * len(self._domains)
        self._sequences, self._ended = 0, False
        self._states = {j: LaneState(draws=list(zeros), tokens=list(zeros)) for j in self._list_own_lanes()}

    def _list_own_lanes(self) -> list[int]:
        """Return the numbers of the lanes that this rank packs."""
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        if not self._config.infinite:
            return [0]
        return [j for j in range(self._num_lanes) if j // B % R == r]

    def _name_lane(self, lane: int) -> str:
        """Return the key of a lane's entry in the state."""
        # DCP refuses a checkpoint of another global batch size with a missing key. The number of lanes in the key makes
        # that message clear.
        return f"lane_{lane:05d}_of_{self._num_lanes:05d}"

    def _describe_order(self) -> dict[str, Any]:
        """Return all settings that the order of the sequences depends on. A state is valid for the same ones only."""
        return {
            "seed": self._config.seed,
            "seq_len": self._seq_len,
            "global_batch_size": self._config.global_batch_size,
            "infinite": self._config.infinite,
            "mixture": self._mixture,
            "shards": {domain.name: domain.store.fingerprint for domain in self._domains},
        }

    def _check_identity(self, saved: dict[str, Any]) -> None:
        own = self._describe_order()
        differing = [
            f"{name}: {saved.get(name)} in the checkpoint, {own[name]} now"
            for name in own
            if saved.get(name) != own[name]
        ]
        if differing:
            raise RefusedInput(
                "the loader's state belongs to another order of data, so the next unseen sample is unknown: "
                + "; ".join(differing)
                + ". Restore what it was (`shards` are hashes of each domain's index.json), or begin the data anew "
                "with checkpoint.exclude_from_loading=['dataloader']"
            )

    def _end_iteration(self) -> None:
        """End the present iterator, if there is one, and drop the batches that were prepared for it."""
        self._packer.shutdown(wait=False, cancel_futures=True)
        self._packer = _new_packer()

    def _iterate(self, packer: ThreadPoolExecutor) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yield batches that the thread of `packer` prepares, until the pass ends or `packer` is replaced."""
        if self._ended:
            self._rewind()
        single_pass, weights = not self._config.infinite, list(self._mixture.values())
        deficits = compute_initial_deficits(self._domains, weights, self._num_lanes)
        lanes = {
            j: Lane(j, self._num_lanes, self._domains, weights, self._seq_len, single_pass, deficits[j], state)
            for j, state in self._states.items()
        }
        source = self._pack_single_pass(lanes[0]) if single_pass else self._pack_endlessly(lanes, self._sequences)
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

    def _pack_endlessly(self, lanes: dict[int, Lane], sequences: int) -> Iterator[_Batch]:
        """Yield micro-batches without end. `sequences` is the number of sequences yielded before, over all ranks."""
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        while True:
            first = sequences % self._num_lanes + r * B
            rows = [lanes[j].next_sequence() for j in range(first, first + B)]
            yield self._make_batch(rows, {j: deepcopy(lanes[j].state) for j in range(first, first + B)})
            sequences += R * B

    def _pack_single_pass(self, lane: Lane) -> Iterator[_Batch]:
        """Yield this rank's micro-batches of one pass. Every rank packs all sequences and keeps its own."""
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        while True:
            rows = [lane.next_sequence() for _ in range(R * B)]
            if lane.state.sequences == 0:
                raise RefusedInput(
                    f"shards is {self._config.shards!r}: none of the {lane.state.skipped} documents of the domains "
                    f"{list(self._mixture)} has a token to train on within {self._seq_len} positions; a document needs "
                    "2 tokens, and a conversation one that its loss_mask marks"
                )
            # The lane has ended if the first row is empty. If only later rows are empty, they become padding.
            if not rows[0]:
                return
            yield self._make_batch(rows[r * B : (r + 1) * B], {0: deepcopy(lane.state)})

    def _make_batch(self, rows: list[list[Segment]], states: dict[int, LaneState]) -> _Batch:
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


def _open_domains(config: StreamingLoader.Config) -> list[Domain]:
    """Return the domains of the mixture, or all domains of the folder, sorted by name."""
    check_mixture(config.mixture)
    names = sorted(config.mixture) if is_remote(config.shards) else list_domains(config.shards)
    check_domains(config.shards, config.mixture, names)
    cache = Path(config.local) if config.local else default_cache()
    return [
        Domain(name, f"{config.shards.rstrip('/')}/{name}", cache, seed=config.seed, cache_bytes=config.cache_bytes)
        for name in sorted(config.mixture or names)
    ]


def _resolve_mixture(config: StreamingLoader.Config, domains: list[Domain]) -> dict[str, float]:
    """Return the share of each domain, in the order of `domains`.

    Without a mixture the shares are in proportion to the domains' sizes in bytes.
    """
    if config.mixture:
        return {domain.name: config.mixture[domain.name] for domain in domains}
    total = sum(domain.num_bytes for domain in domains)
    return {domain.name: domain.num_bytes / total for domain in domains}
