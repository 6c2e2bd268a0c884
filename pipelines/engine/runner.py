"""`run_steps`: bring the steps of a run up to date, in order, and record what happened."""

import os
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from core.atomic import find_free_path, partial_path, remove_leftovers
from pipelines.engine.fingerprints import fingerprint, step_identities
from pipelines.engine.manifest import Manifest, current_time
from pipelines.engine.step import Step, StepFailed, decide, select_until


def run_steps(
    steps: list[Step],
    run: Path,
    manifest: Manifest,
    *,
    until: str | None,
    restart_from: str | None,
    log_line: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Bring every step up to date, in order, as far as `until`. Neighbours that need nothing of each other run at once.

    Args:
        restart_from: compute this step and those after it anew. The same request again, before the run reached its
            end, continues instead of starting over.
        log_line: called with each line that the user should see.
        stop: set when the user interrupted the run. A step that then raises counts as interrupted, not as failed.

    Raises:
        StepFailed: a step raised, whatever it raised: a `RefusedInput` inside of a step is a failure too, since work
            has started. The traceback lies in logs/STEP.driver.log, the error's text in the manifest.
    """
    _remove_leftovers(steps, run, manifest)
    names = [step.name for step in steps]
    steps = select_until(steps, until)
    if restart_from and manifest.content.get("restart") != restart_from:
        manifest.content["restart"] = restart_from
        manifest.forget(names[names.index(restart_from) :])
    numbers = {step.name: number for number, step in enumerate(steps, 1)}
    for group in group_independent(steps):
        starting: list[tuple[Step, dict[str, str]]] = []
        for step in group:
            inputs = step_identities(manifest, step.needs)
            decision = decide(step, inputs, manifest.step(step.name), run)
            log_line(f"step {numbers[step.name]} of {len(steps)}  {step.name}: {decision.action} ({decision.why})")
            if decision.action == "skip":
                continue
            # Where the user asked for a step anew, nothing of its former outputs is to be taken over.
            if decision.action == "run" or (decision.action == "redo" and not step.replaces_outputs):
                archive_outputs(step, run, log_line)
            starting.append((step, inputs))
        _execute_at_once(starting, run, manifest, stop)
    manifest.content.pop("restart", None)
    manifest.save()


def group_independent(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in their order, in groups of neighbours of which none needs another of its group."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and not {other.name for other in groups[-1]} & set(step.needs):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _execute_at_once(
    steps: Sequence[tuple[Step, dict[str, str]]], run: Path, manifest: Manifest, stop: threading.Event
) -> None:
    """Execute steps, each with its inputs, in threads of their own, and wait for all of them.

    Raises:
        StepFailed: that of the first step that failed; the others have ended, too, and what they finished counts.
    """
    failures: dict[str, BaseException] = {}

    def execute(step: Step, inputs: dict[str, str]) -> None:
        try:
            _execute(step, inputs, run, manifest, stop)
        except BaseException as error:
            failures[step.name] = error

    # Daemons: work that does not end after an interrupt must not keep the process alive.
    threads = [threading.Thread(target=execute, args=job, name=job[0].name, daemon=True) for job in steps[1:]]
    for thread in threads:
        thread.start()
    if steps:
        execute(*steps[0])
    for thread in threads:
        thread.join()
    for step, _ in steps:
        if step.name in failures:
            raise failures[step.name]


def _execute(step: Step, inputs: dict[str, str], run: Path, manifest: Manifest, stop: threading.Event) -> None:
    own = fingerprint(step, inputs)
    record = {"version": step.version, "fingerprint": own, "identity": own, "config": step.config, "inputs": inputs}
    manifest.start(step.name, record)
    try:
        result = step.work() or {}
    except BaseException as error:
        if stop.is_set():
            # Closing the cluster makes the step raise; that is the interrupt's doing and no fault of the step.
            manifest.finish(step.name, "interrupted")
        else:
            manifest.finish(step.name, "failed", error=f"{type(error).__name__}: {error}")
            _append_traceback(run / "logs" / f"{step.name}.driver.log")
        raise StepFailed(step.name, str(error), run / "logs") from error
    manifest.finish(step.name, "done", identity=result.pop("identity", own), result=result)


def _remove_leftovers(steps: list[Step], run: Path, manifest: Manifest) -> None:
    """Remove what killed processes were writing, except in finished outputs: those are whole, and may be large."""
    done = {run / path for step in steps if manifest.step(step.name)["state"] == "done" for path in step.outputs}
    remove_leftovers(run, skip=done | {run / "stale"})


def _append_traceback(log: Path) -> None:
    """Append the traceback of the exception being handled to a log file, with the time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{current_time()}\n{traceback.format_exc()}\n")


def archive_outputs(step: Step, run: Path, log_line: Callable[[str], None]) -> None:
    """Move the former outputs of a step to `stale/`, finished and partial ones: days of work may be in either.

    Nothing that an earlier change had moved there is replaced; the next one gets a number.
    """
    for output in step.outputs:
        for path in (run / output, partial_path(run / output)):
            archive_path(path, run, log_line)


def archive_path(path: Path, run: Path, log_line: Callable[[str], None]) -> None:
    """Move a file or folder of a run to `stale/`; a missing one is no error."""
    if path.exists():
        archived = find_free_path(run / "stale" / path.relative_to(run))
        archived.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, archived)
        moved = f"{path.relative_to(run)} moved to {archived.relative_to(run)}"
        log_line(f"  former {moved}; delete it when you don't need it")
