"""`run_steps`: bring the steps of a run up to date, one after the other, and record what happened."""

import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from core.atomic import partial_path, remove
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
    """Bring every step up to date, in order, as far as `until`.

    Args:
        restart_from: compute this step and those after it anew. The same request again, before the run reached its
            end, continues instead of starting over.
        log_line: called with each line that the user should see.
        stop: set when the user interrupted the run. A step that then raises counts as interrupted, not as failed.

    Raises:
        StepFailed: a step raised, whatever it raised: a `RefusedInput` inside of a step is a failure too, since work
            has started. The traceback lies in logs/STEP.driver.log, the error's text in the manifest.
    """
    names = [step.name for step in steps]
    steps = select_until(steps, until)
    if restart_from and manifest.content.get("restart") != restart_from:
        manifest.content["restart"] = restart_from
        manifest.forget(names[names.index(restart_from) :])
    for number, step in enumerate(steps, 1):
        inputs = step_identities(manifest, step.needs)
        decision = decide(step, inputs, manifest.step(step.name), run)
        log_line(f"step {number} of {len(steps)}  {step.name}: {decision.action} ({decision.why})")
        if decision.action == "skip":
            continue
        if decision.action != "resume":
            archive_outputs(step, run, log_line)
        _execute(step, inputs, run, manifest, stop)
    manifest.content.pop("restart", None)
    manifest.save()


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


def _append_traceback(log: Path) -> None:
    """Append the traceback of the exception being handled to a log file, with the time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{current_time()}\n{traceback.format_exc()}\n")


def archive_outputs(step: Step, run: Path, log_line: Callable[[str], None]) -> None:
    """Move the former outputs of a step to `stale/` and remove its partial outputs.

    Outputs that an earlier change had moved there are replaced: `stale/` keeps one former version.
    """
    for output in step.outputs:
        path = run / output
        remove(partial_path(path))
        if path.exists():
            archived = run / "stale" / output
            remove(archived)
            archived.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, archived)
            log_line(f"  former {output} moved to stale/{output}; delete it when you don't need it")
