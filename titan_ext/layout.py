"""The parts of a layout that a recipe may leave open: who shares experts and weights, recomputation, compile."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

from titan_ext.cards import GPUS_PER_NODE, Machine
from titan_ext.config import ModelDims, ParallelConfig, Recomputation, StageConfig
from titan_ext.memory import estimate_memory
from titan_ext.roofline import estimate_step, splits_a_sequence
from titan_ext.traffic import count_shards

RECOMPUTATION: tuple[Recomputation, ...] = get_args(Recomputation)
SPARE = 0.1
"""Share of a GPU's memory that the estimate must leave: for fragmentation, NCCL's buffers and the driver."""
AMPLE = 0.25
"""Share that it must leave where recomputation is chosen by it: on a GPU the estimate was never measured, and less
recomputation gains less than a run loses that ends for want of memory."""
EQUAL = 0.05
"""Share by which the computed times of two layouts may differ and still count as equal."""


@dataclass(frozen=True)
class Option:
    """A layout that may be chosen, and what it costs by estimate and roofline."""

    parallel: ParallelConfig
    spare: float
    """Share of a GPU's memory that all stages leave; below 0 where it is too small."""
    enough: float
    """Share that they should leave: `AMPLE`, or `SPARE` where recomputation is stated."""
    seconds: float
    """Time of all stages' steps on their GPUs."""
    waiting: float
    """Part of it in which the kernels wait for the network."""
    traffic: float
    """Time of all that travels, whether a kernel waits for it or not."""
    tokens_per_second: float
    """Tokens of all stages that a GPU trains, over that time."""

    @property
    def fits(self) -> bool:
        """Return whether the stages leave enough memory."""
        return self.spare >= self.enough


@dataclass(frozen=True)
class Choice:
    """The layouts between which `settle_layout` chooses, the chosen one first."""

    options: tuple[Option, ...]

    @property
    def reason(self) -> str:
        """Return in one sentence why the first option is chosen."""
        best, *others = self.options
        name = describe_sharding(best.parallel)
        if not best.fits:
            return f"{name} leaves {max(0.0, best.spare):.0%} of the memory, and no layout leaves {best.enough:.0%}."
        if not best.seconds:
            return f"{name} exchanges no tokens; layouts that split a sequence or the layers are not timed."
        parts = best.parallel.expert_ranks
        beside = (
            next((other for other in others if other.parallel.expert_ranks != parts), None),
            next((other for other in others if other.parallel.expert_ranks == parts), None),
        )
        gaps = [_describe_gap(best, other) for other in beside if other is not None]
        waits = f"{name} waits for the network in {best.waiting / best.seconds:.0%} of its time by the roofline"
        return "; ".join([waits, *gaps]) + "."


def _describe_gap(best: Option, other: Option) -> str:
    name, slower = describe_sharding(other.parallel), other.seconds / best.seconds - 1
    if not other.fits:
        return f"{name} does not leave enough memory"
    waits = f"which waits in {other.waiting / other.seconds:.0%}"
    if slower > EQUAL:
        return f"{name}, {waits}, is {slower:.0%} slower"
    traffic = f"its traffic takes {other.traffic / best.traffic:.2f} times as long"
    return f"{name}, {waits}, is as fast to {EQUAL:.0%}, and {traffic}"


def settle_layout(
    dims: ModelDims, stages: Iterable[StageConfig], parallel: ParallelConfig, machine: Machine | None
) -> ParallelConfig:
    """Return the layout with values in place of None: what is stated stays as it is.

    On the CPU these are: no expert parallelism, one replica, nothing computed again, nothing compiled. On a GPU blocks
    are compiled, and the layout is the first of `rank_layouts`.

    Args:
        machine: GPUs and network; None for training on the CPU.
    """
    compiled = machine is not None if parallel.compile is None else parallel.compile
    settled = replace(parallel, compile=compiled)
    if machine is None:
        return replace(
            settled,
            expert_parallel=parallel.expert_parallel or 1,
            data_parallel_replicate=parallel.data_parallel_replicate or 1,
            activation_checkpoint=parallel.activation_checkpoint or "none",
        )
    trained = [stage for stage in stages if stage.steps]
    if parallel.expert_parallel is None or parallel.data_parallel_replicate is None:
        return rank_layouts(dims, trained, settled, machine).options[0].parallel
    return _settle_recomputation(dims, trained, settled, machine.card.memory)


def rank_layouts(dims: ModelDims, stages: Iterable[StageConfig], parallel: ParallelConfig, machine: Machine) -> Choice:
    """Return the layouts that a recipe's layout leaves open, the best first.

    First come those that leave enough memory, with the least recomputation for it, by their time. Of those that are
    equally fast, first those that share experts over the fewest ranks: the roofline does not know that these ranks wait
    for the one whose experts have the most tokens. Then the one whose traffic takes the least. Layouts that split a
    sequence or the layers are not timed: those without expert parallelism come first, and with a replica a node. Then
    come layouts that leave less than an ample share, by their memory, and last those that a run refuses.
    """
    trained = [stage for stage in stages if stage.steps]
    found = [_time_option(dims, trained, sharding, machine) for sharding in _list_shardings(dims, parallel)]
    fitting = [option for option in found if option.fits]
    tight = [option for option in found if not option.fits and option.spare >= SPARE]
    others = [option for option in found if option.spare < min(SPARE, option.enough)]
    by_memory = sorted(tight, key=lambda option: -option.spare)
    return Choice((*_sort_by_time(fitting), *by_memory, *_sort_by_time(others)))


def _sort_by_time(options: list[Option]) -> list[Option]:
    fastest = min((option.seconds for option in options), default=0.0)

    def rank(option: Option) -> tuple[float, ...]:
        if option.seconds <= fastest * (1 + EQUAL):
            return 0, option.parallel.expert_ranks, option.traffic
        return 1, option.seconds

    return sorted(options, key=rank)


def describe_sharding(parallel: ParallelConfig) -> str:
    """Return who shares experts and weights, in a few words."""
    shards = count_shards(parallel)
    how = f"HSDP, {parallel.replicas} replicas of {shards}" if parallel.replicas > 1 else f"FSDP over {shards}"
    return f"EP {parallel.expert_ranks}, {how}"


def _list_shardings(dims: ModelDims, parallel: ParallelConfig) -> list[ParallelConfig]:
    """Return the layouts with a stated or possible number of replicas and of ranks that share the experts.

    Possible are one replica, or one a node; and numbers of ranks of one node that divide the experts and the shards.
    """
    ranks = parallel.world_size // (parallel.pipeline_parallel * parallel.tensor_parallel * parallel.context_parallel)
    nodes, rest = divmod(parallel.world_size, GPUS_PER_NODE)
    several = not rest and nodes > 1 and ranks % nodes == 0
    replicas = [parallel.data_parallel_replicate] if parallel.data_parallel_replicate else [1]
    if parallel.data_parallel_replicate is None and several:
        replicas = [nodes, 1]
    experts = [parallel.expert_parallel] if parallel.expert_parallel else range(1, GPUS_PER_NODE + 1)
    options = [
        replace(parallel, expert_parallel=parts, data_parallel_replicate=copies)
        for parts in experts
        for copies in replicas
    ]
    possible = [
        option
        for option in options
        if dims.n_experts % option.expert_ranks == 0 and count_shards(option) % option.expert_ranks == 0
    ]
    return possible or options


def _settle_recomputation(
    dims: ModelDims, stages: list[StageConfig], parallel: ParallelConfig, gpu_memory: int
) -> ParallelConfig:
    """Return the layout that computes as little again as fits all stages; all of a block where nothing does."""
    if parallel.activation_checkpoint is not None:
        return parallel
    choices = [replace(parallel, activation_checkpoint=name) for name in RECOMPUTATION]
    fitting = (choice for choice in choices if _measure_spare(dims, stages, choice, gpu_memory) >= AMPLE)
    return next(fitting, choices[-1])


def _measure_spare(dims: ModelDims, stages: list[StageConfig], parallel: ParallelConfig, gpu_memory: int) -> float:
    peaks = [estimate_memory(dims, stage, parallel).peak for stage in stages]
    return 1 - max(peaks, default=0) / gpu_memory


def _time_option(dims: ModelDims, stages: list[StageConfig], sharding: ParallelConfig, machine: Machine) -> Option:
    parallel, memory = _settle_recomputation(dims, stages, sharding, machine.card.memory), machine.card.memory
    spare = _measure_spare(dims, stages, parallel, memory)
    enough = SPARE if sharding.activation_checkpoint else AMPLE
    if splits_a_sequence(parallel):  # no time is known: the order of `_list_shardings` decides
        return Option(parallel, spare, enough, 0.0, 0.0, 0.0, 0.0)
    seconds = waiting = traffic = tokens = 0.0
    for stage in stages:
        step = estimate_step(dims, stage, parallel, machine)
        seconds += stage.steps * step.total
        waiting += stage.steps * step.micro_batches * step.waiting
        moved = step.traffic.forward + step.traffic.backward + step.traffic.tokens
        traffic += stage.steps * step.micro_batches * moved
        tokens += stage.tokens / parallel.world_size
    return Option(parallel, spare, enough, seconds, waiting, traffic, tokens / seconds if seconds else 0.0)
