"""`mobilemoe run`: hold the run folder, start or join Ray if there is anything to do, and show the progress."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from core.errors import RefusedInput
from pipelines.commands import inputs
from pipelines.commands.command import Address, emit_result, parse_arguments
from pipelines.commands.recipe_argument import choose_recipe
from pipelines.commands.supervise import supervise, take_signals
from pipelines.display import Display, format_table
from pipelines.engine.manifest import Manifest
from pipelines.engine.run_lock import lock_run
from pipelines.engine.runner import run_steps
from pipelines.engine.step import is_up_to_date, list_pending, plan_actions
from pipelines.preflight import check_disk
from pipelines.printing import quote_command
from pipelines.recipe import Recipe
from pipelines.shared_data import DATA_ADDRESS, choose_shared_data
from pipelines.status import RunStatus, read_status
from pipelines.steps import STEPS
from pipelines.steps.context import Context
from pipelines.validation.validate_recipe import validate_recipe

if TYPE_CHECKING:
    from pipelines.ray.cluster import Cluster

    StepName = str
else:
    StepName = Literal[STEPS]  # built from the list of steps, which a type checker cannot follow


@dataclass(frozen=True)
class Run:
    """Run a recipe the whole way, or part of it. The same command again continues where it stopped."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path | None = None
    """Run folder; runs/RECIPE if not given."""
    until: StepName | None = None
    """Stop after this step."""
    from_: Annotated[StepName | None, tyro.conf.arg(name="from")] = None
    """Compute this step and those after it anew."""
    data: Address | None = None
    """Take over a finished data set: the folder of another run, or an address that `mobilemoe data` sent one to. A run
    remembers it."""
    continue_from: str | None = None
    """Go on from the checkpoint of this step (12000, or sft:12000) with the options that have changed. What the stage
    did after it moves to stale/."""
    json: bool = False
    """Print the run's status as one JSON object on stdout at the end."""


def parse(words: Sequence[str]) -> Run:
    """Parse RECIPE, a Python file or `--like RUN`, and the options that change the recipe.

    Raises:
        RefusedInput: there is no such recipe, or the file or run gives none.
        UsageShown: no recipe is named.
        SystemExit: a wrong option, or --help after RECIPE.
    """
    options = "[--out DIR] [--data ADDRESS] [--until STEP] [--from STEP] [--continue-from N] [--json]"
    recipe, title, rest = choose_recipe("run", options, words)
    return parse_arguments(Run, rest, f"run {title}", Run(recipe=recipe, out=Path("runs") / recipe.name))


def run(arguments: Run) -> None:
    """Run a recipe and print the status of its run folder.

    Raises:
        RefusedInput, StepFailed, KeyboardInterrupt: as `run_recipe`.
    """
    assert arguments.out is not None, "`parse` fills it"
    status = run_recipe(
        arguments.recipe,
        arguments.out.absolute(),
        until=arguments.until,
        restart_from=arguments.from_,
        data=arguments.data,
        continue_from=arguments.continue_from,
    )
    emit_result(arguments.json, status.to_dict(), lambda: format_table(status))


def run_recipe(
    recipe: Recipe,
    run: Path,
    *,
    until: str | None,
    restart_from: str | None,
    data: str | None = None,
    continue_from: str | None = None,
) -> RunStatus:
    """Run a recipe in a run folder as far as `until`, and return its status.

    Args:
        restart_from: compute this step and those after it anew.
        data: address of a data set to take over; None stands for that of the run's last call, if it had one.
        continue_from: STEP or STAGE:STEP; the stage goes on from this checkpoint instead of starting over.

    Raises:
        RefusedInput: no step was started; nothing was created either, unless the lock or the cluster refused.
        StepFailed: a step failed; the same call continues.
        KeyboardInterrupt: interrupted; the same call continues.
    """
    validate_recipe(recipe)
    _check_order(until, restart_from, continue_from)
    inputs.require_output_folder("--out", run)
    # Slow to import, as Ray is below: only once the recipe has been accepted.
    from eval.benchmarks.items import PACKAGE
    from pipelines.steps.build_steps import build_steps
    from pipelines.steps.continue_stage import find_continuation

    shared = choose_shared_data(data, recipe.data, run)
    planned = build_steps(Context(recipe, run, None, print, shared), PACKAGE)
    actions = plan_actions(planned, run, Manifest(run)) | ({"data": "skip"} if shared else {})
    if continue_from:
        actions[find_continuation(continue_from, planned, run, Manifest(run), print).name] = "resume"
    check_disk(recipe, run, actions)
    run.mkdir(parents=True, exist_ok=True)
    with lock_run(run):
        manifest, stop = Manifest(run), threading.Event()

        def bring_up_to_date(cluster: "Cluster | None", log_line: Callable[[str], None]) -> None:
            steps = build_steps(Context(recipe, run, cluster, log_line, shared), PACKAGE)
            continuation = find_continuation(continue_from, steps, run, manifest, log_line) if continue_from else None
            run_steps(
                steps, run, manifest, until=until, restart_from=restart_from, continuation=continuation,
                log_line=log_line, stop=stop,
            )  # fmt: skip

        manifest.content |= {DATA_ADDRESS: shared.address} if shared else {}
        if restart_from is None and is_up_to_date(planned, run, manifest, until):
            with Display(run, until) as display:
                manifest.describe(recipe)
                bring_up_to_date(None, display.log_line)
        else:
            from pipelines.ray.cluster import Cluster

            pending = list_pending(planned, run, manifest, until, restart_from)
            trains = any(name in pending and stage.steps for name, stage in recipe.stages.items())
            take_signals()
            with Cluster(recipe.cluster, run, recipe.parallel.world_size) as cluster, Display(run, until) as display:
                take_signals()
                cluster.check_size(trains=trains, evaluates="eval" in pending)
                manifest.describe(recipe)
                print_header(display, cluster, run)
                supervise(lambda: bring_up_to_date(cluster, display.log_line), display, cluster, stop)
    return read_status(run)


def _check_order(until: str | None, restart_from: str | None, continue_from: str | None) -> None:
    """Check that the options that say where a run begins and ends go together.

    Raises:
        RefusedInput: they do not.
    """
    if until and restart_from and STEPS.index(until) < STEPS.index(restart_from):
        raise RefusedInput(
            f"--until {until} comes before --from {restart_from}; choose a later --until or an earlier --from"
        )
    if continue_from and restart_from:
        raise RefusedInput("--continue-from and --from: the one keeps a stage's work, the other starts over; give one")


def print_header(display: Display, cluster: "Cluster", run: Path) -> None:
    """Show where the run lies and where it can be watched."""
    display.log_line(f"run folder   {run}")
    display.log_line(f"dashboard    {cluster.dashboard}")
    display.log_line(f"curves       {quote_command('tensorboard', '--logdir', run / 'stages')}")
