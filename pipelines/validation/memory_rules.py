"""The rule for the memory of a GPU, and the search for the nearest layout that keeps it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pipelines.recipe import Recipe, Stages
from pipelines.validation import training_rules
from pipelines.validation.problems import Problem
from titan_ext.config import ParallelConfig, StageConfig
from titan_ext.layout import RECOMPUTATION, SPARE, settle_layout
from titan_ext.memory import MemoryEstimate, estimate_memory


@dataclass(frozen=True)
class Layout:
    """A way to run the stages of a recipe on its GPUs."""

    parallel: ParallelConfig
    stages: Stages

    def describe_changes(self, recipe: Recipe) -> list[str]:
        """Return the options that change the recipe to this layout, with their values."""
        recomputation = self.parallel.activation_checkpoint
        changes = []
        if recomputation != settle(recipe).activation_checkpoint:
            changes = [f"--parallel.activation-checkpoint {recomputation}"]
            recipe = replace(recipe, parallel=replace(recipe.parallel, activation_checkpoint=recomputation))
        settled = settle(replace(recipe, stages=self.stages))  # what the recipe leaves open may change with the rest
        changes += [
            f"--parallel.{name.replace('_', '-')} {getattr(self.parallel, name)}"
            for name in ("data_parallel_replicate", "expert_parallel")
            if getattr(self.parallel, name) != getattr(settled, name)
        ]
        return changes + [
            f"--stages.{name}.local-batch-size {stage.local_batch_size}"
            for name, stage in self.stages.items()
            if stage.local_batch_size != recipe.stages.get(name).local_batch_size
        ]


def settle(recipe: Recipe) -> ParallelConfig:
    """Return the recipe's layout with what it leaves open chosen for its processors, their memory and their network."""
    return settle_layout(recipe.model, list_stages(recipe), recipe.parallel, recipe.cluster.machine)


def list_stages(recipe: Recipe) -> list[StageConfig]:
    """Return the recipe's stages in training order."""
    return [stage for _, stage in recipe.stages.items()]


def estimate_stages(recipe: Recipe, layout: Layout | None = None) -> dict[str, MemoryEstimate]:
    """Return the memory of a rank in each stage, under the recipe's layout or another."""
    layout = layout or Layout(settle(recipe), recipe.stages)
    return {name: estimate_memory(recipe.model, stage, layout.parallel) for name, stage in layout.stages.items()}


def find_memory_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem if a stage needs more than a GPU has, with the nearest layout that fits.

    The recipe must keep the rules of `training_rules`.
    """
    if (memory := _read_gpu_memory(recipe)) is None:
        return
    peaks = {name: estimate.peak for name, estimate in estimate_stages(recipe).items()}
    worst = max(peaks, key=lambda name: peaks[name])
    limit = memory * (1 - SPARE)
    if peaks[worst] <= limit:
        return
    nearest = find_nearest_layout(recipe)
    rule = f"stage {worst} needs about {peaks[worst] / 1e9:.1f} GB a GPU, and may take {limit / 1e9:.1f} GB: a tenth "
    rule += "stays free for fragmentation, NCCL and the driver"
    if nearest is None:
        way_out = "no layout on as many GPUs fits; raise --parallel.world-size, or take GPUs with more memory"
    else:
        peak = max(estimate.peak for estimate in estimate_stages(recipe, nearest).values())
        way_out = f"{' '.join(nearest.describe_changes(recipe))} fits with {peak / 1e9:.1f} GB"
    yield Problem("cluster.gpu_memory", memory, rule, way_out)


def find_nearest_layout(recipe: Recipe) -> Layout | None:
    """Return the layout that fits with the fewest changes, and of these the cheapest; None if none fits.

    Cheapest first: recomputation, fewer replicas (which gather over more ranks), smaller micro-batches, experts over
    more ranks (whose exchange is waited for).
    """
    if (memory := _read_gpu_memory(recipe)) is None:
        return None
    limit = memory * (1 - SPARE)
    for layout in sorted(_list_layouts(recipe), key=lambda layout: _rank_changes(recipe, layout)):
        if all(estimate.peak <= limit for estimate in estimate_stages(recipe, layout).values()):
            return layout
    return None


def _read_gpu_memory(recipe: Recipe) -> int | None:
    """Return the bytes of one GPU; None where ranks have none."""
    machine = recipe.cluster.machine
    return None if machine is None else machine.card.memory


def _list_layouts(recipe: Recipe) -> Iterator[Layout]:
    """Yield every valid layout that differs from the recipe's in what the search may change."""
    start = settle(recipe)
    recomputation = RECOMPUTATION[RECOMPUTATION.index(start.activation_checkpoint or "none") :]
    replicas = [n for n in range(1, start.replicas + 1) if start.replicas % n == 0]
    experts = [n for n in range(1, recipe.model.n_experts + 1) if recipe.model.n_experts % n == 0]
    largest = max(stage.local_batch_size for _, stage in recipe.stages.items())
    batches = [2**n for n in range(largest.bit_length())]
    for checkpoint, replicate, expert, divisor in product(recomputation, replicas, experts, batches):
        changes: dict[str, Any] = {
            "activation_checkpoint": checkpoint, "data_parallel_replicate": replicate, "expert_parallel": expert,
        }  # fmt: skip
        stages = {name: _divide_batch(stage, divisor) for name, stage in recipe.stages.items()}
        layout = Layout(replace(start, **changes), Stages(**stages))
        if _is_valid(recipe, layout):
            yield layout


def _divide_batch(stage: StageConfig, divisor: int) -> StageConfig:
    return replace(stage, local_batch_size=max(1, stage.local_batch_size // divisor))


def _is_valid(recipe: Recipe, layout: Layout) -> bool:
    changed = replace(recipe, parallel=layout.parallel, stages=layout.stages)
    problems = list(training_rules.find_parallel_problems(recipe.model, layout.parallel))
    for name, stage in layout.stages.items():
        problems += training_rules.find_stage_problems(name, stage, changed)
    return not problems


def _rank_changes(recipe: Recipe, layout: Layout) -> tuple[float, ...]:
    """Return a key that sorts layouts: the number of kinds of changes, then how much of each, dearest kind first."""
    start = settle(recipe)
    steps = RECOMPUTATION.index(layout.parallel.activation_checkpoint or "none") - RECOMPUTATION.index(
        start.activation_checkpoint or "none"
    )
    replicas = start.replicas / layout.parallel.replicas
    experts = abs(layout.parallel.expert_ranks - start.expert_ranks)
    batch = sum(
        recipe.stages.get(name).local_batch_size / stage.local_batch_size - 1 for name, stage in layout.stages.items()
    )
    kinds = sum((steps > 0, replicas > 1, experts > 0, batch > 0))
    return kinds, experts, batch, replicas, steps
