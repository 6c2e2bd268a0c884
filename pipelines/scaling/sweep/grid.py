"""Expand the grids of a sweep into the runs that train its points.

A run is one model and learning rate, trained to several numbers of tokens: its learning rate stays at its height (the
plateau), and at each number of tokens a branch decays from it (arXiv 2405.18392, 2404.06395). A branch starts from the
plateau's checkpoint, so the plateau is trained once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from math import ceil, gcd, isfinite

from core.errors import RefusedInput
from pipelines.recipe import Recipe
from pipelines.scaling.dimensions import build_dims
from pipelines.validation import training_rules
from pipelines.validation.number_ranges import find_range_problems
from pipelines.validation.problems import InvalidRecipe, Problem
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.model_stats import count_parameters
from titan_ext.training.schedules import steps_for


@dataclass(frozen=True)
class Grid:
    """Lists of values; the models are their product. E = 1 is a dense model, which no granularity divides."""

    d_model: tuple[int, ...]
    experts: tuple[int, ...]
    """Coarse experts E."""
    tokens: tuple[float, ...]
    """Training tokens at which a branch decays and the held-out loss is measured."""
    granularity: tuple[int, ...] = (8,)
    """Fine experts in a coarse one."""
    shared: tuple[bool, ...] = (True,)
    """Whether half of a token's fine experts are one shared expert. An odd granularity has none, whatever this says."""
    learning_rate_factors: tuple[float, ...] = (1.0,)
    """Multiples of the rule's learning rate. Points of another factor than 1 check the rule and enter no fit."""


@dataclass(frozen=True)
class Sweep:
    """A sweep: what all of its points share, and its grids, whose points are joined."""

    recipe: Recipe
    """Data, seed, parallelism and cluster of every point; its pre-training gives context, batch, warm-up and mixture,
    and its model vocabulary, heads and longest context."""
    grids: tuple[Grid, ...]
    learning_rate: float
    """Learning rate at `base_width`."""
    base_width: int
    """d_model of `learning_rate`."""
    width_exponent: float = 0.5
    """The rule: learning rate = learning_rate x (base_width / d_model)^width_exponent. 1 is muP's for hidden matrices
    (arXiv 2203.03466), 0 the published constant rate."""
    decay_fraction: float = 0.2
    """Share of a point's steps over which the learning rate decays."""


@dataclass(frozen=True)
class Branch:
    """The end of one point: from the plateau's step `start` the learning rate decays until the point's last step."""

    tokens: int
    """Number of trained tokens of the point, whole optimizer steps."""
    stage: StageConfig
    start: int
    """Step of the plateau's checkpoint from which the learning rate decays."""


@dataclass(frozen=True)
class SweepRun:
    """One model and learning rate, with a branch for each number of tokens, in ascending order."""

    name: str
    model: ModelDims
    experts: int
    granularity: int | None
    """None for the dense model."""
    shared: bool | None
    learning_rate_factor: float
    parallel: ParallelConfig
    """The recipe's layout; its expert parallelism is lowered to a number of ranks that divides the experts."""
    branches: tuple[Branch, ...]

    @property
    def trained_tokens(self) -> int:
        """Return the tokens that the run trains on: the plateau once, and every decay."""
        batch = self.branches[0].tokens // self.branches[0].stage.steps
        steps, done = 0, 0
        for branch in self.branches:
            steps += branch.stage.steps - done
            done = branch.start
        return steps * batch

    @property
    def train_flops(self) -> float:
        """Return the FLOPs of the training, 6 x active parameters x trained tokens."""
        return 6.0 * count_parameters(self.model).active * self.trained_tokens


def expand_sweep(sweep: Sweep) -> list[SweepRun]:
    """Return the runs of all grids, each model and learning rate once, the most expensive first.

    Raises:
        RefusedInput: a list is empty or has a value that no model can have, or the points break the rules of training;
            names the field or the run.
    """
    tokens_of: dict[tuple[int, int, int, bool, float], set[float]] = {}
    for number, grid in enumerate(sweep.grids):
        for key in _list_models(grid, f"grids[{number}]"):
            tokens_of.setdefault(key, set()).update(grid.tokens)
    if not tokens_of:
        raise RefusedInput("grids: the sweep has no grid; give at least one")
    for name in ("learning_rate", "base_width"):
        value = getattr(sweep, name)
        if not (isfinite(value) and value > 0):
            raise RefusedInput(f"{name} = {value}: must be above 0 and finite")
    if not abs(sweep.width_exponent) <= 2:
        raise RefusedInput(f"width_exponent = {sweep.width_exponent}: must lie between -2 and 2; 1 is muP's")
    if not 0 < sweep.decay_fraction < 1:
        raise RefusedInput(f"decay_fraction = {sweep.decay_fraction}: must lie between 0 and 1")
    runs = [_build_run(sweep, key, sorted(tokens)) for key, tokens in tokens_of.items()]
    for run in runs:
        _check_run(sweep.recipe, run)
    return sorted(runs, key=lambda run: -run.train_flops)


def _list_models(grid: Grid, where: str) -> Iterator[tuple[int, int, int, bool, float]]:
    """Yield (d_model, E, granularity, shared, learning-rate factor) of every model of a grid, a dense one once."""
    _check_values(grid, where)
    seen = set()
    for d_model, experts, granularity, shared, factor in product(
        grid.d_model, grid.experts, grid.granularity, grid.shared, grid.learning_rate_factors
    ):
        has_shared = shared and granularity % 2 == 0
        key = (d_model, 1, 1, False, factor) if experts == 1 else (d_model, experts, granularity, has_shared, factor)
        if key not in seen:
            seen.add(key)
            yield key


def _check_values(grid: Grid, where: str) -> None:
    """Check that every list of a grid has values, and only such as it can have.

    Raises:
        RefusedInput: one has not; names the list.
    """
    kinds: dict[str, tuple[type, ...]] = {
        "shared": (bool,),
        "tokens": (int, float),
        "learning_rate_factors": (int, float),
    }
    for field in fields(grid):
        values, kind = getattr(grid, field.name), kinds.get(field.name, (int,))
        if not values or any(type(value) not in kind for value in values):
            wanted = "true or false" if bool in kind else "numbers" if float in kind else "whole numbers"
            raise RefusedInput(f"{where}.{field.name} = {list(values)}: must be a list of {wanted}, not empty")
        if field.name != "shared" and any(not (isfinite(value) and value > 0) for value in values):
            raise RefusedInput(f"{where}.{field.name} = {list(values)}: must be above 0 and finite")


def _build_run(sweep: Sweep, key: tuple[int, int, int, bool, float], tokens: list[float]) -> SweepRun:
    d_model, experts, granularity, shared, factor = key
    like, parallel = sweep.recipe.model, sweep.recipe.parallel
    model = build_dims(
        d_model, experts, granularity=granularity, shared=shared, vocab_size=like.vocab_size, head_dim=like.head_dim,
        kv_heads=like.n_kv_heads, max_seq_len=like.max_seq_len,
    )  # fmt: skip
    is_dense = experts == 1
    # What the recipe leaves open is chosen for each model.
    shared_by = None if parallel.expert_parallel is None else gcd(parallel.expert_parallel, model.n_experts)
    parts = [f"d{d_model}", f"E{experts}", "dense" if is_dense else f"g{granularity}", "shared" if shared else ""]
    name = "_".join(filter(None, [*parts, f"lr{factor:g}" if factor != 1 else ""]))
    rate = sweep.learning_rate * factor * (sweep.base_width / d_model) ** sweep.width_exponent
    branches = [_build_branch(sweep, rate, number, name) for number in tokens]
    for before, after in pairwise(branches):
        if before.start >= after.start:
            raise RefusedInput(
                f"{name}: {before.tokens:,} and {after.tokens:,} tokens are too close for plateaus of their own; drop "
                "one"
            )
    return SweepRun(
        name=name,
        model=model,
        experts=experts,
        granularity=None if is_dense else granularity,
        shared=None if is_dense else shared,
        learning_rate_factor=factor,
        parallel=replace(parallel, expert_parallel=shared_by),
        branches=tuple(branches),
    )


def _build_branch(sweep: Sweep, rate: float, tokens: float, name: str) -> Branch:
    """Return the branch that ends at `tokens`. Its start is a checkpoint, and it is kept until the branch has ended."""
    stage = sweep.recipe.stages.pretrain
    steps = steps_for(tokens, stage.seq_len, stage.global_batch_size)
    wanted = steps - max(1, round(steps * sweep.decay_fraction))
    intervals = max(1, ceil(wanted / (stage.checkpoint_interval or wanted)))
    interval = wanted // intervals
    start = interval * intervals
    if start < 1 or start < stage.warmup_steps:
        raise RefusedInput(
            f"{name}: {tokens:,.0f} tokens are {steps} steps, of which {steps - start} decay and stages.pretrain."
            f"warmup_steps = {stage.warmup_steps} warm up, so no plateau is left; give more tokens, or a shorter "
            "warm-up"
        )
    return Branch(
        tokens=steps * stage.seq_len * stage.global_batch_size,
        start=start,
        stage=replace(
            stage,
            steps=steps,
            learning_rate=rate,
            decay_fraction=(steps - start) / steps,
            checkpoint_interval=interval,
            checkpoint_minutes=0,
            checkpoint_permanent_tokens=0,
            checkpoints_kept=2 + (steps - start) // interval,
            heldout_interval=steps,
        ),
    )


def _check_run(recipe: Recipe, run: SweepRun) -> None:
    """Check a run by the rules for a recipe's model, layout and stage; a sweep neither quantizes nor exports it."""
    problems: list[Problem] = [
        *training_rules.find_model_problems(run.model),
        *training_rules.find_parallel_problems(run.model, run.parallel),
    ]
    for branch in run.branches:
        fitted = replace(recipe, model=run.model, parallel=run.parallel)
        problems += training_rules.find_stage_problems("pretrain", branch.stage, fitted)
        problems += find_range_problems(branch.stage, "stages.pretrain.")
    if problems:
        raise InvalidRecipe(f"{run.name} of the sweep", list(dict.fromkeys(problems)))
