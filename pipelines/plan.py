"""`plan_run`: what a recipe needs and costs, computed from the recipe and the catalogue without running anything."""

import math
from dataclasses import asdict, replace
from typing import Any

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import RemoteFiles
from data.config import DataConfig
from data.mixture import count_heldout_tokens, count_split_tokens
from data.planning import MEASURED, TOKEN_BYTES, plan_data
from data.sources import UNIT_TEXT_BYTES
from pipelines.recipe import Recipe
from pipelines.validation.epoch_rules import count_repetitions
from pipelines.validation.memory_rules import Layout, estimate_stages, find_nearest_layout, list_stages, settle
from pipelines.validation.problems import InvalidRecipe
from pipelines.validation.training_rules import find_parallel_problems
from pipelines.validation.validate_recipe import find_problems
from titan_ext.cards import GPUS_PER_NODE, Machine
from titan_ext.config import ParallelConfig, StageConfig
from titan_ext.layout import SPARE, Option, describe_sharding, rank_layouts
from titan_ext.model_stats import count_parameters
from titan_ext.roofline import estimate_tokens_per_second
from titan_ext.traffic import count_traffic

UNUSABLE = ("data", "cluster.gpu", "cluster.network_gbits")
"""Fields without which nothing can be computed, beside those of model, layout and stages."""
EXPERT_PARALLEL = 4
"""Number of ranks that share the experts in the paper's layout (arXiv 2605.27358)."""
LAYOUT_EVIDENCE = (
    "Without expert parallelism FSDP gathers a layer's weights while the layer before computes; with it, the experts "
    "wait for the tokens. Reported for 64 experts on 8 H100, in another program: FSDP 21.5% of the peak, EP 2 20.7%, "
    "EP 4 18.9%, EP 8 17.0% (marin-community/marin #6979); with 512 experts it was the reverse (#7332). Nothing of "
    "this was measured with this program."
)
ROOFLINE_SOURCE = "computed for {gpu} with {gbits:g} Gbit/s a GPU, not run: a roofline (titan_ext/roofline.py)"
"""What `plan_stages` says of its tokens a second."""


def plan_run(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe needs and costs, as JSON-ready values; sizes are in bytes.

    `refusals` are the reasons for which `mobilemoe run` would refuse the recipe.

    Raises:
        InvalidRecipe: numbers of the model, the layout, the stages or the data make no sense to compute with.
    """
    problems = list(find_problems(recipe))
    unusable = [p for p in problems if p.field in UNUSABLE or p.field.startswith(("model.", "parallel.", "stages."))]
    if unusable:
        raise InvalidRecipe(recipe.name, unusable)
    count = count_parameters(recipe.model)
    return {
        "recipe": recipe.name,
        "parameters": asdict(count) | {"total": count.total, "active": count.active},
        "memory": plan_memory(recipe),
        "stages": plan_stages(recipe),
        "data": plan_data_step(recipe.data),
        "refusals": [str(problem) for problem in problems],
    }


def plan_memory(recipe: Recipe) -> dict[str, Any]:
    """Return the memory and the traffic of a rank by layout and stage: the recipe's, the other kind, and the nearest.

    The nearest is there only if the recipe's own layout does not fit a GPU.
    """
    layouts = {"recipe": Layout(settle(recipe), recipe.stages)}
    if (other := find_other_layout(recipe)) is not None:
        layouts["other"] = other
    machine = recipe.cluster.machine
    limit = machine.card.memory * (1 - SPARE) if machine else None
    described = {name: _describe_layout(recipe, layout, limit) for name, layout in layouts.items()}
    if not described["recipe"]["fits"] and (nearest := find_nearest_layout(recipe)) is not None:
        described["nearest"] = _describe_layout(recipe, nearest, limit)
    return {"limit": limit, "layouts": described, "choice": plan_choice(recipe, machine) if machine else None}


def plan_choice(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Return the layouts of the recipe's GPUs by the roofline, the best first, and why the recipe has its own."""
    own = settle(recipe)
    stated = recipe.parallel.expert_parallel is not None and recipe.parallel.data_parallel_replicate is not None
    opened = replace(recipe.parallel, expert_parallel=None, data_parallel_replicate=None, compile=own.compile)
    everything = rank_layouts(recipe.model, list_stages(recipe), opened, machine)
    if stated:
        reason = f"{describe_sharding(own)} is stated in the recipe. Left open: {everything.reason}"
    else:
        left = rank_layouts(recipe.model, list_stages(recipe), replace(recipe.parallel, compile=own.compile), machine)
        reason = left.reason
    return {
        "gpu": machine.card.name,
        "network_gbits": machine.network_gbits,
        "options": [_describe_option(option, own) for option in everything.options],
        "reason": reason,
        "evidence": LAYOUT_EVIDENCE,
    }


def _describe_option(option: Option, own: ParallelConfig) -> dict[str, Any]:
    sharding = describe_sharding(option.parallel)
    return {
        "sharding": sharding,
        "recomputation": option.parallel.activation_checkpoint,
        "recipe": sharding == describe_sharding(own),
        "fits": option.fits,
        "tokens_per_second": option.tokens_per_second,
        "waiting": option.waiting / option.seconds if option.seconds else None,
    }


def find_other_layout(recipe: Recipe) -> Layout | None:
    """Return the layout to compare with: without expert parallelism if the recipe has it, else with the paper's.

    None if the recipe's number of ranks allows no such layout.
    """
    own = settle(recipe)
    if own.expert_ranks > 1:
        replicas = own.world_size // own.pipeline_parallel // GPUS_PER_NODE
        candidates = [replace(own, expert_parallel=1, data_parallel_replicate=n) for n in (replicas, 1) if n]
    else:
        candidates = [replace(own, expert_parallel=EXPERT_PARALLEL, data_parallel_replicate=1)]
    for parallel in candidates:
        if not list(find_parallel_problems(recipe.model, parallel)):
            return Layout(parallel, recipe.stages)
    return None


def _describe_layout(recipe: Recipe, layout: Layout, limit: float | None) -> dict[str, Any]:
    stages = {}
    for name, estimate in estimate_stages(recipe, layout).items():
        stage = layout.stages.get(name)
        stages[name] = asdict(estimate) | {
            "peak": estimate.peak,
            "local_batch_size": stage.local_batch_size,
            "traffic": asdict(count_traffic(recipe.model, stage, layout.parallel)),
        }
    peak = max(stage["peak"] for stage in stages.values())
    return {
        "title": describe_parallel(layout.parallel),
        "parallel": asdict(layout.parallel),
        "stages": stages,
        "peak": peak,
        "fits": limit is None or peak <= limit,
    }


def describe_parallel(parallel: ParallelConfig) -> str:
    """Return a layout in a few words."""
    degrees = (("TP", "tensor"), ("CP", "context"), ("PP", "pipeline"))
    more = [f"{short} {n}" for short, name in degrees if (n := getattr(parallel, f"{name}_parallel")) > 1]
    how = f"recomputation {parallel.activation_checkpoint}, {'compiled' if parallel.compile else 'not compiled'}"
    return ", ".join([describe_sharding(parallel), *more, how])


def plan_stages(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return steps, tokens, computed speed, shards of the folder, and the repetition of each domain, by stage."""
    available, repetitions = count_split_tokens(recipe.data), count_repetitions(recipe)
    return {
        name: {
            "steps": stage.steps,
            "tokens": stage.tokens,
            "roofline": _plan_speed(recipe, stage),
            "folder": stage.shards,
            "shards": _count_shards(available[stage.shards], recipe.data.shard_bytes),
            "max_epochs": recipe.data.max_epochs[name],
            "domains": {
                domain: asdict(repetition) | {"epochs": repetition.epochs}
                for domain, repetition in repetitions[name].items()
            },
        }
        for name, stage in recipe.stages.items()
    }


def _plan_speed(recipe: Recipe, stage: StageConfig) -> dict[str, Any] | None:
    """Return tokens a second of a GPU and GPU-hours, computed by a roofline; None where it has no answer."""
    machine = recipe.cluster.machine
    rate = estimate_tokens_per_second(recipe.model, stage, settle(recipe), machine) if machine else None
    if machine is None or rate is None:
        return None
    source = ROOFLINE_SOURCE.format(gpu=machine.card.name, gbits=machine.network_gbits)
    return {"tokens_per_second": rate, "gpu_hours": stage.tokens / rate / 3600, "source": source}


def _count_shards(tokens: dict[str, float | None], shard_bytes: int) -> int | None:
    """Return the number of shards of a folder, a domain's own each; None where the tokens of a domain are unknown."""
    counts = list(tokens.values())
    if not counts or None in counts:
        return None
    return sum(math.ceil((n or 0) * TOKEN_BYTES / shard_bytes) for n in counts)


def plan_data_step(config: DataConfig) -> dict[str, Any]:
    """Return the cost of the data step over all of its corpora, at the measured rates of data/planning.py."""
    corpora = [CATALOGUE[name] for name in config.corpora]
    text = sum(corpus.text_bytes for corpus in corpora)
    compared = [c.text_bytes for c in corpora if c.kind == "text" and not c.deduplicated]
    group = (sum(compared) if config.near_duplicates_within == "all" else max(compared, default=0)) / text
    plan = plan_data(
        text / MEASURED.text_bytes_per_token,
        MEASURED,
        shard_bytes=config.shard_bytes,
        largest_group=group,
        compared=sum(compared) / text,
    )
    remote = [c.text_bytes for c in corpora if isinstance(c.source, RemoteFiles)]
    units = sum(math.ceil(size / UNIT_TEXT_BYTES) for size in remote)
    units += sum(c.shards for c in corpora if not isinstance(c.source, RemoteFiles))
    return asdict(plan) | {
        "units": units,
        "corpora": len(corpora),
        "heldout_tokens": count_heldout_tokens(config),
        "core_hours": plan.clean_core_hours + plan.tokenize_core_hours,
        "hours_on_1000_cores": plan.estimate_hours(1000),
    }
