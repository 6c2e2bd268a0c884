"""Estimate what a sweep costs before it starts: points, tokens, FLOPs and hours."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pipelines.preflight import CHECKPOINT_BYTES_PER_PARAMETER
from pipelines.recipe import Recipe
from pipelines.scaling.points import Point
from pipelines.scaling.sweep.grid import SweepRun
from titan_ext.model_stats import count_parameters

GPU_FLOPS = 0.17 * 989e12
"""Training FLOPs a second of an H100 assumed before anything is measured: 17% of its bf16 peak, what the one public run
of a model of this kind reached (HobbyLM-1B on H200)."""
CPU_FLOPS = 10e9
"""The same of a core of a CPU with AVX2: the tiny sweep's models trained at 8 to 17 GFLOP/s on an EPYC."""


@dataclass(frozen=True)
class SweepEstimate:
    """The cost of a sweep."""

    runs: int
    points: int
    tokens: float
    """Trained tokens of all runs, each plateau once."""
    tokens_without_branches: float
    """The same if every point was trained from its start."""
    train_flops: float
    flops_per_rank: float
    """Assumed or measured FLOPs a second of one rank."""
    rate_source: str
    ranks: int
    """Ranks of one run."""
    runs_at_once: int
    rank_hours: float
    disk_bytes: float
    """Checkpoints: the last one of every point, and those of a run that a next branch may start from."""
    hours: float
    """Time of the whole sweep with `runs_at_once`; the longest run alone where that is longer."""

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate JSON-ready."""
        return asdict(self)


def estimate_sweep(
    recipe: Recipe, runs: Sequence[SweepRun], *, rate: float | None, runs_at_once: int, finished: Sequence[Point]
) -> SweepEstimate:
    """Estimate the cost of all runs.

    Args:
        rate: FLOPs a second of one rank; None takes the median of `finished`, or an assumption.
        runs_at_once: runs that the machine or cluster trains side by side.
        finished: points of the same sweep that are measured.
    """
    source = "--rate"
    if rate is None:
        rate, source = _find_rate(recipe, finished)
    ranks = recipe.parallel.world_size
    flops = [run.train_flops for run in runs]
    seconds = [value / (rate * ranks) for value in flops]
    branches = [branch for run in runs for branch in run.branches]
    return SweepEstimate(
        runs=len(runs),
        points=len(branches),
        tokens=sum(run.trained_tokens for run in runs),
        tokens_without_branches=sum(branch.tokens for branch in branches),
        train_flops=sum(flops),
        flops_per_rank=rate,
        rate_source=source,
        ranks=ranks,
        runs_at_once=runs_at_once,
        disk_bytes=estimate_disk(runs),
        rank_hours=sum(seconds) * ranks / 3600,
        hours=max(sum(seconds) / max(1, min(runs_at_once, len(runs))), max(seconds)) / 3600,
    )


def estimate_disk(runs: Sequence[SweepRun]) -> float:
    """Return the bytes of all checkpoints that a sweep leaves, and of those that it holds while a run trains."""
    total = 0
    for run in runs:
        kept = max(branch.stage.checkpoints_kept for branch in run.branches)
        number = len(run.branches) + kept
        total += count_parameters(run.model).total * CHECKPOINT_BYTES_PER_PARAMETER * number
    return total


def _find_rate(recipe: Recipe, finished: Sequence[Point]) -> tuple[float, str]:
    batch = recipe.stages.pretrain.seq_len * recipe.stages.pretrain.global_batch_size
    rates = [6 * point.active * batch / point.step_seconds for point in finished if point.step_seconds]
    if rates:
        return median(rates) / recipe.parallel.world_size, f"median of {len(rates)} finished points"
    if recipe.cluster.gpus_per_worker:
        return GPU_FLOPS, "assumed: 17% of an H100's bf16 peak"
    return CPU_FLOPS * recipe.cluster.cpus_per_worker, "assumed: 10 GFLOP/s a core"


def count_runs_at_once(recipe: Recipe, cpus: float, gpus: float) -> int:
    """Return the number of runs that fit into these resources side by side, at least 1."""
    world, cluster = recipe.parallel.world_size, recipe.cluster
    fits = [cpus // (world * cluster.cpus_per_worker)]
    if cluster.gpus_per_worker:
        fits.append(gpus // (world * cluster.gpus_per_worker))
    return max(1, int(min(fits)))
