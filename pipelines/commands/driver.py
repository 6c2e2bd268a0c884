"""`mobilemoe run`: hold the run folder, start or join Ray if there is anything to do, and show how it goes."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from pipelines.engine.manifest import Manifest, driver_lock
from pipelines.engine.steps import run_steps, up_to_date
from pipelines.preflight import check_disk
from pipelines.progress import LIVE_INTERVAL_SECONDS, Display, RunStatus, read_status
from pipelines.recipe import Recipe
from pipelines.steps.graph import STEPS, Context, build
from pipelines.validate import validate

INTERRUPT_PATIENCE_SECONDS = 20


def run_recipe(recipe: Recipe, run: Path, *, until: str | None, restart_from: str | None) -> RunStatus:
    """Run a recipe in a run folder as far as `until`, and return its status.

    Raises:
        RefusedInput: refused; no step was started, and nothing created unless the lock or the cluster refuses.
        StepFailed: a step failed; the same call continues.
        KeyboardInterrupt: interrupted; the same call continues.
    """
    validate(recipe)
    if until and restart_from and STEPS.index(until) < STEPS.index(restart_from):
        raise RefusedInput(
            f"--until {until} comes before --from {restart_from}; choose a later --until or an earlier --from"
        )
    check_disk(recipe, run)
    run.mkdir(parents=True, exist_ok=True)
    with driver_lock(run):
        from eval.benchmarks.items import PACKAGE

        manifest, stop = Manifest(run), threading.Event()

        def bring_up_to_date(cluster: Any, say: Callable[[str], None]) -> None:
            steps = build(Context(recipe, run, cluster, say), PACKAGE)
            run_steps(steps, run, manifest, until=until, restart_from=restart_from, say=say, stop=stop)

        steps = build(Context(recipe, run, None, print), PACKAGE)
        if restart_from is None and up_to_date(steps, run, manifest, until):
            with Display(run) as display:
                manifest.describe(recipe)
                bring_up_to_date(None, display.say)
            return read_status(run)
        from pipelines.ray.cluster import Cluster

        signal.signal(signal.SIGTERM, _interrupt)  # what a batch system sends before it kills
        with Cluster(recipe.cluster, run, recipe.parallel.world_size) as cluster, Display(run) as display:
            signal.signal(signal.SIGTERM, _interrupt)  # Ray put its own in place
            cluster.check_size()
            manifest.describe(recipe)
            _greet(display, cluster, run)
            _watch(lambda: bring_up_to_date(cluster, display.say), display, cluster, stop)
    return read_status(run)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _greet(display: Display, cluster: Any, run: Path) -> None:
    display.say(f"run folder   {run}")
    display.say(f"dashboard    {cluster.dashboard_url or 'none'}")
    display.say(f"curves       tensorboard --logdir {run / 'stages'}")


def _watch(work: Callable[[], None], display: Display, cluster: Any, stop: threading.Event) -> None:
    """Run `work` in a thread, so that this one can show progress and take an interrupt at any moment."""
    failure: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=guarded, name="steps", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LIVE_INTERVAL_SECONDS)
            display.refresh()
    except KeyboardInterrupt:
        stop.set()
        display.say("interrupted: stopping the workers; the same command continues")
        cluster.close()
        thread.join(INTERRUPT_PATIENCE_SECONDS)
        raise
    if failure:
        raise failure[0]
