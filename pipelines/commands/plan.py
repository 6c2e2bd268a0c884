"""`mobilemoe plan`: what a recipe needs and costs, before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.commands.command import emit_result, parse_arguments
from pipelines.commands.recipe_argument import choose_recipe
from pipelines.recipe import Recipe

PARTS = (
    "parameters", "gradients", "optimizer", "gathered", "reduction", "activations", "recomputed", "logits", "head",
    "head_gradient", "combination", "rounded", "teacher",
)  # fmt: skip
"""Parts of titan_ext.memory.MemoryEstimate, in the order of the table."""
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Plan:
    """Parameters, memory a GPU, layouts, tokens, repetitions and the data step of a recipe. It runs nothing."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    json: bool = False
    """One JSON object on stdout."""


def parse(words: Sequence[str]) -> Plan:
    """Parse RECIPE, a Python file or `--like RUN`, and the options that change the recipe.

    Raises:
        RefusedInput: there is no such recipe, or the file or run gives none.
        UsageShown: no recipe is named.
        SystemExit: a wrong option, or --help after RECIPE.
    """
    recipe, title, rest = choose_recipe("plan", "[--json]", words)
    return parse_arguments(Plan, rest, f"plan {title}", Plan(recipe=recipe))


def show_plan(arguments: Plan) -> None:
    """Print the plan of a recipe, with the reasons for which `mobilemoe run` would refuse it.

    Raises:
        InvalidRecipe: the recipe's numbers make no sense to compute with.
    """
    from pipelines.plan import plan_run

    plan = plan_run(arguments.recipe)
    emit_result(arguments.json, plan, lambda: format_plan(plan))


def format_plan(plan: dict[str, Any]) -> RenderableType:
    """Return the plan as tables and sentences."""
    parameters, memory = plan["parameters"], plan["memory"]
    parts: list[RenderableType] = [
        Text(f"{plan['recipe']}: {parameters['total']:,} parameters, {parameters['active']:,} active")
    ]
    parts += [_format_layout(name, layout) for name, layout in memory["layouts"].items()]
    if memory["limit"] is not None:
        parts.append(Text(f"A stage may take {_gb(memory['limit'])} GB, so that a tenth of the GPU stays free."))
    if memory["choice"]:
        parts += _format_choice(memory["choice"])
    parts += [_format_stages(plan["stages"]), _format_epochs(plan["stages"]), _format_data(plan["data"])]
    parts += [Text(f"run would refuse: {refusal}", style="red") for refusal in plan["refusals"]]
    return Group(*parts)


def _format_layout(name: str, layout: dict[str, Any]) -> Table:
    verdict = "fits" if layout["fits"] else "does not fit"
    table = Table(title=f"memory of a rank, GB; {name} layout, {verdict}: {layout['title']}")
    stages = layout["stages"]
    for column in ("", *stages):
        table.add_column(column, justify="right" if column else "left")
    for part in PARTS:
        if any(stage[part] for stage in stages.values()):
            table.add_row(part, *(_gb(stage[part]) for stage in stages.values()))
    table.add_row("peak", *(_gb(stage["peak"]) for stage in stages.values()), style="bold")
    table.add_section()
    table.add_row("sequences of a micro-batch", *(str(stage["local_batch_size"]) for stage in stages.values()))
    for kind, what in (("weights", "weights"), ("replicas", "replicas' gradients"), ("tokens", "tokens")):
        received = (_gb(stage["traffic"][kind]) for stage in stages.values())
        table.add_row(f"{what} received a micro-batch", *received)
    return table


def _format_choice(choice: dict[str, Any]) -> list[RenderableType]:
    """Return the table of the possible layouts, and the sentences that say why the recipe has its own."""
    table = Table(
        title=f"layouts of these GPUs ({choice['gpu']}, {choice['network_gbits']:g} Gbit/s a GPU), the best first",
        caption="Computed over all stages by a roofline, not run.",
    )
    for column in ("", "layout", "recomputation", "tokens/s of a GPU", "waits for the network", "leaves enough memory"):
        table.add_column(column, justify="right" if column.endswith(("GPU", "network")) else "left")
    for option in choice["options"]:
        waits = UNKNOWN if option["waiting"] is None else f"{option['waiting']:.0%}"
        rate = UNKNOWN if option["waiting"] is None else f"{option['tokens_per_second']:,.0f}"
        mark, fits = "*" if option["recipe"] else "", "yes" if option["fits"] else "no"
        table.add_row(mark, option["sharding"], option["recomputation"], rate, waits, fits)
    return [table, Text(choice["reason"]), Text(choice["evidence"])]


def _format_stages(stages: dict[str, Any]) -> Table:
    speeds = [stage["roofline"] for stage in stages.values() if stage["roofline"]]
    caption = f"Tokens a second of a GPU, and GPU-hours: {speeds[0]['source']}." if speeds else None
    table = Table(title="stages", caption=caption)
    columns = ("", "steps", "tokens", "shards of its folder", *(("tokens/s, computed", "GPU-hours") if speeds else ()))
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, stage in stages.items():
        shards, speed = UNKNOWN if stage["shards"] is None else f"{stage['shards']:,}", stage["roofline"]
        cells = (f"{speed['tokens_per_second']:,.0f}", f"{speed['gpu_hours']:,.0f}") if speed else ()
        table.add_row(name, f"{stage['steps']:,}", _billions(stage["tokens"]), f"{shards} ({stage['folder']})", *cells)
    return table


def _format_epochs(stages: dict[str, Any]) -> Table:
    table = Table(title="epochs", caption="Tokens are the catalogue's, before cleaning.")
    for column in ("stage", "domain", "share", "tokens wanted", "tokens there", "epochs", "allowed"):
        table.add_column(column, justify="left" if column in ("stage", "domain") else "right")
    for name, stage in stages.items():
        for domain, entry in stage["domains"].items():
            there = UNKNOWN if entry["available"] is None else _billions(entry["available"])
            epochs = UNKNOWN if entry["epochs"] is None else f"{entry['epochs']:,.2f}"
            share, wanted = f"{entry['share']:.4g}", _billions(entry["wanted"])
            table.add_row(name, domain, share, wanted, there, epochs, f"{stage['max_epochs']:g}")
        table.add_section()
    return table


def _format_data(data: dict[str, Any]) -> Table:
    heldout = data["heldout_tokens"]
    table = Table(title="data step", caption="At rates that were measured on a slow core (docs/data.md).")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in (
        ("corpora", f"{data['corpora']:,}"),
        ("text", _gb(data["text_bytes"]) + " GB"),
        ("units", f"{data['units']:,}"),
        ("longest unit, hours of a core", f"{data['longest_unit_hours']:,.1f}"),
        ("core-hours", f"{data['core_hours']:,.0f}"),
        ("hours on 1,000 cores", f"{data['hours_on_1000_cores']:,.1f}"),
        ("held out, tokens", UNKNOWN if heldout is None else _billions(heldout)),
        ("shards", _gb(data["storage_bytes"]) + " GB"),
        ("disk at the worst moment", _gb(data["peak_bytes"]) + " GB"),
    ):
        table.add_row(name, value)
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def _billions(tokens: float) -> str:
    return f"{tokens / 1e9:,.3f}B"
