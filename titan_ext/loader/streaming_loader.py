"""torchtitan dataloader over MDS shards: token-exact mixture, packed documents, the same order on any number of ranks.

A document goes shard (titan_ext/loader/domain.py) -> lane (titan_ext/loader/packing.py) -> micro-batch (here). Shape legend: B
sequences of a micro-batch (torchtitan's local batch), L tokens of a sequence; G sequences of a global batch, R data-
parallel ranks.
"""

import hashlib
import json
import math
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
from titan_ext.loader.domain import Domain, list_domains
from titan_ext.loader.packing import Lane, LaneState, Segment, fill, head_starts
from titan_ext.loader.shard_store import VOCABULARY_KEY, default_cache, is_remote

PREFETCH_BATCHES = 4
"""Micro-batches prepared ahead of the training loop."""


class _Batch(NamedTuple):
    inputs: dict[str, torch.Tensor]
    labels_BL: torch.Tensor
    states: dict[int, LaneState]
    """By lane: where it stands after this batch."""


class StreamingLoader(BaseDataLoader):
    """Yields ({"input": int64 [B, L], "positions": int64 [B, L]}, labels int64 [B, L], -100 where nothing is
    predicted).

    Micro-batch a of a step on rank r holds the sequences (a * R + r) * B ... + B - 1 of the global batch, so the
    global batch, in the order micro-batch, rank, row, is the same for every R and B. With `infinite=False` every
    document comes once; the last micro-batch is filled up with sequences of padding, and all ranks stop after the same
    number of micro-batches.

    `iter()` goes on after the last batch taken, and what was prefetched beyond it is prepared again; after the end of a
    finite pass it starts over. Only the newest iterator may be used.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        shards: str
        """Folder or address of a stage: one MDS folder a domain."""
        local: str = ""
        """Cache folder for shards that are remote or compressed; empty: a folder under the machine's temporary
        directory.
        """
        mixture: dict[str, float] = field(default_factory=dict)
        """Domain -> share of the tokens, sums to 1. Empty: all domains of a local folder by their size."""
        global_batch_size: Annotated[int, tyro.conf.Suppress] = 0
        """G: sequences a step over all ranks. The trainer sets it from the training config."""
        seed: int = 0
        """Of the order of documents."""
        pad_token_id: int
        infinite: bool = True
        """Go through the documents again and again; otherwise one pass."""
        cache_bytes: int = 64 << 30
        """Raw shards kept in `local`, over all domains; those longest unused are dropped beyond it."""

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
        """`tokenizer` is compared with the one that made the shards; `snapshot_every_n_steps` is what torchtitan hands
        every loader, but the state is exact at every batch. Raises RefusedInput for what cannot be trained on, naming the
        field.
        """
        _check_shape(config, dp_world_size, dp_rank, seq_len, local_batch_size)
        self._config = config
        self._dp_world_size, self._dp_rank, self._seq_len, self._local_batch_size = (
            dp_world_size, dp_rank, seq_len, local_batch_size,
        )  # fmt: skip
        self._domains = _open_domains(config)
        _check_tokenizer(self._domains, tokenizer)
        self._mixture = _mixture(config, self._domains)
        # One pass is one lane dealt to all ranks: they then agree on its end without talking to each other.
        self._num_lanes = config.global_batch_size if config.infinite else 1
        self._packer = _new_packer()
        self._rewind()

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._end_iteration()
        return self._batches(self._packer)

    def state_dict(self) -> dict[str, Any]:
        """One entry a lane of this rank, and two that all ranks share: torch.distributed.checkpoint merges them by
        key, and a run on another number of ranks asks for the lanes it then has.
        """
        lanes = {self._lane_key(j): json.dumps(asdict(self._states[j])) for j in self._own_lanes()}
        return {"sequences": self._sequences, "identity": json.dumps(self._identity()), **lanes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; an empty one is the beginning.

        Raises RefusedInput where it belongs to other data or another batch shape, naming what differs.
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
        missing = [key for key in map(self._lane_key, self._own_lanes()) if key not in state_dict]
        if missing:
            raise RefusedInput(f"the loader's state lacks {missing[0]}: merge the states of all ranks it was taken on")
        self._sequences = state_dict["sequences"]
        for j in self._own_lanes():
            self._states[j] = LaneState(**json.loads(state_dict[self._lane_key(j)]))

    def statistics(self) -> dict[str, Any]:
        """What this rank's lanes have yielded so far, over resumes; in a finite pass what all ranks have.

        {"sequences", "padding" (share of positions), "truncated", "skipped" (documents), and by domain "tokens"
        (positions) and "epochs" (documents drawn, over all lanes at this rank's rate, per documents there are)}.
        """
        states = [self._states[j] for j in self._own_lanes()]
        total = Counter()
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
        """State of the batches handed out: there are none."""
        zeros = [0] * len(self._domains)
        self._sequences, self._ended = 0, False
        self._states = {j: LaneState(draws=list(zeros), tokens=list(zeros)) for j in self._own_lanes()}

    def _own_lanes(self) -> list[int]:
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        if not self._config.infinite:
            return [0]
        return [j for j in range(self._num_lanes) if j // B % R == r]

    def _lane_key(self, lane: int) -> str:
        # With their number in the name, a checkpoint of another global batch size is refused by DCP with a telling key.
        return f"lane_{lane:05d}_of_{self._num_lanes:05d}"

    def _identity(self) -> dict[str, Any]:
        """All that the order of the sequences depends on."""
        return {
            "seed": self._config.seed,
            "seq_len": self._seq_len,
            "global_batch_size": self._config.global_batch_size,
            "infinite": self._config.infinite,
            "mixture": self._mixture,
            "shards": {domain.name: domain.store.fingerprint for domain in self._domains},
        }

    def _check_identity(self, saved: dict[str, Any]) -> None:
        own = self._identity()
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
        """The iterator there is, if any, is over, and the batches prepared for it are forgotten."""
        self._packer.shutdown(wait=False, cancel_futures=True)
        self._packer = _new_packer()

    def _batches(self, packer: ThreadPoolExecutor) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        if self._ended:
            self._rewind()
        once, weights = not self._config.infinite, list(self._mixture.values())
        starts = head_starts(self._domains, weights, self._num_lanes)
        lanes = {
            j: Lane(j, self._num_lanes, self._domains, weights, self._seq_len, once, starts[j], state)
            for j, state in self._states.items()
        }
        source = self._pack_once(lanes) if once else self._pack_endlessly(lanes, self._sequences)
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
                self._sequences += self._dp_world_size * self._local_batch_size
                self._states.update(batch.states)
                yield batch.inputs, batch.labels_BL
        finally:
            packer.shutdown(wait=False, cancel_futures=True)

    def _pack_endlessly(self, lanes: dict[int, Lane], sequences: int) -> Iterator[_Batch]:
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        while True:
            first = sequences % self._num_lanes + r * B
            rows = [lanes[j].next_sequence() for j in range(first, first + B)]
            yield self._batch(rows, {j: deepcopy(lanes[j].state) for j in range(first, first + B)})
            sequences += R * B

    def _pack_once(self, lanes: dict[int, Lane]) -> Iterator[_Batch]:
        B, R, r = self._local_batch_size, self._dp_world_size, self._dp_rank
        while True:
            rows = [lanes[0].next_sequence() for _ in range(R * B)]
            if not rows[0]:
                return
            yield self._batch(rows[r * B : (r + 1) * B], {0: deepcopy(lanes[0].state)})

    def _batch(self, rows: list[list[Segment]], states: dict[int, LaneState]) -> _Batch:
        input_BL, positions_BL, labels_BL = np.empty((3, self._local_batch_size, self._seq_len), np.int64)
        for b, segments in enumerate(rows):
            fill(segments, input_BL[b], positions_BL[b], labels_BL[b], self._config.pad_token_id)
        inputs = {"input": torch.from_numpy(input_BL), "positions": torch.from_numpy(positions_BL)}
        return _Batch(inputs, torch.from_numpy(labels_BL), states)


def _new_packer() -> ThreadPoolExecutor:
    """The thread that packs ahead; the interpreter waits for it (`titan_ext.loader.shard_store._workers` says why)."""
    return ThreadPoolExecutor(1, thread_name_prefix="streaming-loader")


def _check_shape(config: StreamingLoader.Config, world_size: int, rank: int, seq_len: int, batch_size: int) -> None:
    if seq_len < 2:
        raise RefusedInput(f"seq_len is {seq_len}; a packed sequence has at least 2 tokens")
    if not 0 <= rank < world_size:
        raise RefusedInput(f"dp_rank is {rank}; with dp_world_size {world_size} it lies in [0, {world_size})")
    if batch_size < 1 or config.global_batch_size < 1 or config.global_batch_size % (world_size * batch_size):
        raise RefusedInput(
            f"global_batch_size is {config.global_batch_size}; it must be a positive multiple of dp_world_size "
            f"{world_size} x local_batch_size {batch_size} = {world_size * batch_size}"
        )
    if config.cache_bytes < 1:
        raise RefusedInput(f"cache_bytes is {config.cache_bytes}; it must be positive, at least a few shards")
    if config.local and Path(config.local).resolve().is_relative_to(Path(config.shards).resolve()):
        raise RefusedInput(
            f"local ({config.local}) lies in shards ({config.shards}), which is never written to: name another"
        )


def _open_domains(config: StreamingLoader.Config) -> list[Domain]:
    """The domains of the mixture, or all there are, by name."""
    _check_mixture(config)
    if is_remote(config.shards):
        if not config.mixture:
            raise RefusedInput(
                f"mixture is empty, and {config.shards} is no local folder whose domains could be listed"
            )
    else:
        present = list_domains(config.shards)
        if not present:
            raise RefusedInput(
                f"shards is {config.shards!r}, which has no folder with an index.json: is it a stage folder?"
            )
        absent = sorted(set(config.mixture) - set(present))
        if absent:
            raise RefusedInput(f"mixture names {absent}, no MDS folders of {config.shards}; present: {present}")
    cache = Path(config.local) if config.local else default_cache()
    return [
        Domain(name, f"{config.shards.rstrip('/')}/{name}", cache, seed=config.seed, cache_bytes=config.cache_bytes)
        for name in sorted(config.mixture or present)
    ]


def vocabulary_sha256(vocabulary: dict[str, int]) -> str:
    """What token ids mean, as one hash: sha256 of `id<TAB>token<LF>` in the order of the ids, UTF-8.

    The data step writes the same into index.json, under VOCABULARY_KEY.
    """
    lines = (f"{index}\t{token}\n" for token, index in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_tokenizer(domains: list[Domain], tokenizer: BaseTokenizer | None) -> None:
    """Refuse shards of another tokenizer: their ids would be trained as other words, and nothing would show it."""
    stated = {domain.name: domain.store.vocabulary for domain in domains if domain.store.vocabulary}
    if tokenizer is None or not stated:
        return
    given = vocabulary_sha256(tokenizer.get_vocab())
    other = {name: vocabulary for name, vocabulary in stated.items() if vocabulary != given}
    if other:
        raise RefusedInput(
            f"the shards of {sorted(other)} were written with another tokenizer: {VOCABULARY_KEY} in their index.json "
            f"is {sorted(set(other.values()))}, that of the tokenizer given here {given}. Name the tokenizer folder of "
            "the data step as hf_assets_path, or write the shards again with this one"
        )


def _check_mixture(config: StreamingLoader.Config) -> None:
    bad = {name: share for name, share in config.mixture.items() if not share > 0}
    if bad:
        raise RefusedInput(f"mixture has shares that are not positive: {bad}; leave those domains out")
    total = math.fsum(config.mixture.values())
    if config.mixture and not abs(total - 1) <= 1e-6:
        raise RefusedInput(f"mixture sums to {total:.9g}, not to 1: {config.mixture}")


def _mixture(config: StreamingLoader.Config, domains: list[Domain]) -> dict[str, float]:
    """Share by domain, in the order of `domains`."""
    if config.mixture:
        return {domain.name: config.mixture[domain.name] for domain in domains}
    total = sum(domain.num_bytes for domain in domains)
    return {domain.name: domain.num_bytes / total for domain in domains}
