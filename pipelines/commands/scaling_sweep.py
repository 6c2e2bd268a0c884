"""`mobilemoe scaling-law sweep`: train the points of a sweep side by side, then fit and draw them."""

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Group
from rich.table import Table
from rich.text import Text

from core.atomic import write_json
from core.cpus import count_cpus
from core.errors import RefusedInput
from pipelines.commands import inputs
from pipelines.commands.command import Address
from pipelines.commands.supervise import supervise, take_signals
from pipelines.display import Display
from pipelines.engine.manifest import Manifest
from pipelines.engine.run_lock import lock_run
from pipelines.engine.runner import run_steps
from pipelines.engine.step import StepFailed
from pipelines.preflight import find_existing_parent
from pipelines.recipe import Recipe
from pipelines.scaling.points import Point
from pipelines.scaling.sizes import parse_size
from pipelines.scaling.sweep.grid import SweepRun, expand_sweep
from pipelines.shared_data import DATA_ADDRESS, choose_shared_data
from pipelines.steps.context import Context
from pipelines.validation.input_rules import find_cluster_problems, find_data_problems
from pipelines.validation.problems import InvalidRecipe

if TYPE_CHECKING:
    from pipelines.ray.cluster import Cluster
    from pipelines.scaling.sweep.estimate import SweepEstimate
    from pipelines.scaling.sweep.train import PointTask

Result = tuple[dict[str, Any], Callable[[], Any]]
"""The JSON-ready result, and the function that formats it for a terminal."""


@dataclass(frozen=True)
class SweepArguments:
    """Train the points of a sweep on Ray, side by side, then fit and draw them. The same command again continues."""

    sweep: tyro.conf.Positional[str]
    """tiny, published, a Python file with a function sweep(), or a JSON file."""
    out: Path | None = None
    """Folder of the sweep: shared data, points, points.csv, fits and figures. Not needed with --estimate."""
    estimate: bool = False
    """Only print what the sweep costs: points, FLOPs, hours, disk."""
    data: Address | None = None
    """Take over a finished data set, as `mobilemoe run --data` does."""
    rate: str | None = None
    """FLOPs a second of one rank for the estimate, for example 150T; measured from finished points, or assumed, if not
    given."""
    runs_at_once: int | None = None
    """Runs that train side by side; as many as the cluster's CPUs and GPUs hold if not given."""
    starts: int = 2_000
    """Starts of each fit's search."""
    draws: int = 200
    """Bootstrap samples of each fit."""
    json: bool = False
    """Print one JSON object on stdout."""


def sweep(arguments: SweepArguments) -> Result:
    """Run a sweep, or estimate it.

    Raises:
        RefusedInput: the sweep, an option or the folder cannot be used; nothing was started.
        StepFailed: the data step or points failed; the same call continues.
        KeyboardInterrupt: interrupted; the same call continues.
    """
    from pipelines.scaling.sweep.load import load_sweep

    for option, value, least in (
        ("--runs-at-once", arguments.runs_at_once, 1),
        ("--starts", arguments.starts, 1),
        ("--draws", arguments.draws, 0),
    ):
        inputs.require_between(option, value, least, 10**6)
    made = load_sweep(arguments.sweep)
    runs = expand_sweep(made)
    rate = None if arguments.rate is None else parse_size(arguments.rate, "--rate")
    if arguments.estimate:
        return _show_estimate(made.recipe, runs, rate, arguments)
    if arguments.out is None:
        raise RefusedInput("--out: name a folder for the sweep, or give --estimate")
    inputs.require_output_folder("--out", arguments.out)
    recipe = keep_pretraining(made.recipe)
    if problems := [*find_data_problems(recipe), *find_cluster_problems(recipe)]:
        raise InvalidRecipe(recipe.name, problems)
    return _run_sweep(recipe, runs, arguments.out.absolute(), arguments)


def keep_pretraining(recipe: Recipe) -> Recipe:
    """Return the recipe without the stages that a sweep does not train, so that it needs no data for them."""
    later = {name: replace(stage, steps=0, mixture={}) for name, stage in recipe.stages.items() if name != "pretrain"}
    return replace(recipe, stages=replace(recipe.stages, **later))


def _show_estimate(recipe: Recipe, runs: Sequence[SweepRun], rate: float | None, arguments: SweepArguments) -> Result:
    from pipelines.scaling.sweep.estimate import count_runs_at_once, estimate_sweep
    from pipelines.scaling.sweep.train import list_tasks, read_finished

    finished = read_finished(list_tasks(recipe, runs, arguments.out)) if arguments.out else []
    local = recipe.cluster.ray_address == ""
    at_once = arguments.runs_at_once or (count_runs_at_once(recipe, count_cpus(), 0) if local else 1)
    found = estimate_sweep(recipe, runs, rate=rate, runs_at_once=at_once, finished=finished)
    return found.to_dict() | {"finished": len(finished)}, lambda: _format_estimate(found, len(finished))


def _format_estimate(found: "SweepEstimate", finished: int) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    saved = 1 - found.tokens / found.tokens_without_branches
    rows = [
        ("runs (a model and a learning rate each)", f"{found.runs:,}"),
        ("points, finished", f"{found.points:,}, {finished:,}"),
        ("trained tokens", f"{found.tokens:.3g}"),
        ("saved by decay branches", f"{saved:.0%}"),
        ("training FLOPs, 6 x active parameters x tokens", f"{found.train_flops:.3g}"),
        ("FLOPs a second and rank", f"{found.flops_per_rank:.3g} ({found.rate_source})"),
        ("ranks of a run x runs side by side", f"{found.ranks} x {found.runs_at_once}"),
        ("rank-hours", f"{found.rank_hours:,.2f}"),
        ("hours, without starts and data", f"{found.hours:,.2f}"),
        ("disk for checkpoints", f"{found.disk_bytes / 1e9:,.1f} GB"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _run_sweep(recipe: Recipe, runs: Sequence[SweepRun], out: Path, arguments: SweepArguments) -> Result:
    from eval.benchmarks.items import PACKAGE
    from pipelines.ray.cluster import Cluster
    from pipelines.scaling.sweep.train import check_folders, list_tasks, read_finished
    from pipelines.steps.build_steps import build_steps

    chains = list_tasks(recipe, runs, out)
    _check_disk(recipe, runs, out)
    shared = choose_shared_data(arguments.data, recipe.data, out)
    out.mkdir(parents=True, exist_ok=True)
    with lock_run(out):
        manifest, stop = Manifest(out), threading.Event()
        if "identity" in manifest.step("data"):
            check_folders(chains, manifest.step("data")["identity"])
        take_signals()
        with Cluster(recipe.cluster, out, recipe.parallel.world_size) as cluster, Display(out, "data") as display:
            take_signals()
            cluster.check_size()
            manifest.describe(recipe)
            manifest.content |= {DATA_ADDRESS: shared.address} if shared else {}
            display.log_line(f"sweep folder  {out}")
            display.log_line(f"dashboard     {cluster.dashboard}")

            def train() -> None:
                steps = build_steps(Context(recipe, out, cluster, display.log_line, shared), PACKAGE)
                run_steps(steps, out, manifest, until="data", restart_from=None, log_line=display.log_line, stop=stop)
                data = manifest.step("data")["identity"]
                check_folders(chains, data)
                _train_points(cluster, chains, data, recipe, arguments.runs_at_once, display.log_line, stop)

            supervise(train, display, cluster, stop)
        return _write_results(read_finished(chains), recipe, out, arguments)


def _check_disk(recipe: Recipe, runs: Sequence[SweepRun], out: Path) -> None:
    from pipelines.scaling.sweep.estimate import estimate_disk

    needed, free = estimate_disk(runs), shutil.disk_usage(find_existing_parent(out)).free
    if needed > free:
        raise RefusedInput(
            f"--out {out}: the checkpoints of the sweep need about {needed / 1e9:,.0f} GB, and {free / 1e9:,.0f} GB "
            "are free; give --out on a larger disk, or drop points"
        )


def _train_points(
    cluster: "Cluster",
    chains: "Sequence[Sequence[PointTask]]",
    data: str,
    recipe: Recipe,
    runs_at_once: int | None,
    log_line: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Train all points.

    Raises:
        StepFailed: points failed; the others are finished.
    """
    from pipelines.scaling.sweep.estimate import count_runs_at_once
    from pipelines.scaling.sweep.train import train_points

    at_once = runs_at_once or count_runs_at_once(recipe, *cluster.count_resources())
    log_line(f"{sum(map(len, chains))} points in {len(chains)} runs, {at_once} runs side by side")
    if failures := train_points(cluster, chains, data, at_once=at_once, log_line=log_line, stop=stop):
        raise StepFailed("sweep", "; ".join(failures), cluster.run / "logs")


def _write_results(points: list[Point], recipe: Recipe, out: Path, arguments: SweepArguments) -> Result:
    from pipelines.scaling.sweep import figures, results

    results.write_points(points, out)
    fits = results.fit_architectures(points, num_starts=arguments.starts, num_draws=arguments.draws)
    for name, fit in fits.items():
        if not isinstance(fit, str):
            law = replace(fit.law, vocab_size=recipe.model.vocab_size)
            write_json(out / f"law_{name}.json", {"law": law.to_dict(), "fit": fit.to_dict()})
    figures.draw_sweep(points, fits, out / "figures")
    summary = results.summarize(points, fits)
    write_json(out / "results.json", summary)
    return summary | {"out": str(out)}, lambda: _format_results(summary, points, out)


def _format_results(summary: dict[str, Any], points: Sequence[Point], out: Path) -> Group:
    table = Table(title="held-out loss, nats a token")
    lengths = sorted({point.tokens for point in points})
    for column in ("run", "active", "total", *(f"{length / 1e6:.2f}M" for length in lengths), "ms a step"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name in dict.fromkeys(point.name for point in sorted(points, key=lambda p: (p.active, p.experts, p.name))):
        own = {point.tokens: point for point in points if point.name == name}
        one = next(iter(own.values()))
        cells = [f"{own[length].loss:.4f}" if length in own else "" for length in lengths]
        step = "" if one.step_seconds is None else f"{one.step_seconds * 1000:,.0f}"
        table.add_row(name, f"{one.active / 1e6:.3f}M", f"{(one.total or 0) / 1e6:.3f}M", *cells, step)
    lines = []
    titles = {
        "equal_compute": "experts - dense at equal training compute", "equal_memory": "experts - dense at equal memory",
        "architectures": "architecture - the coarsest one", "learning_rates": "other learning rate - the rule's",
    }  # fmt: skip
    for key, title in titles.items():
        if summary[key]:
            lines.append(f"{title}, nats:")
            lines += [
                f"  {row['name']} after {row['tokens'] / 1e6:.2f}M: {row['difference']:+.4f} ({row['compared_with']})"
                for row in summary[key]
            ]
    for name, fit in summary["fits"].items():
        lines.append(f"fit {name}: {_describe_fit(fit)}")
    lines.append(f"files: {out}/points.csv, points.json, results.json, law_*.json, figures/")
    return Group(table, Text("\n".join(lines)))


def _describe_fit(fit: dict[str, Any]) -> str:
    """Return a line on a fit of `results.summarize`: how well it fits, and how far it is off without a scale."""
    if "refused" in fit:
        return fit["refused"]
    text = f"{fit['form']} law of {fit['points']} points, RMSE {fit['rmse']:.4f} nats"
    if fit["left_out"]:
        worst = max(fit["left_out"], key=lambda name: fit["left_out"][name])
        text += f"; fitted without {worst} it is off there by {fit['left_out'][worst]:.2g} in log loss"
    if fit["diverged"]:
        text += f"; {fit['diverged']} bootstrap samples diverged, so the points hardly determine it"
    return text
