"""`run_steps`: bring the steps of a run up to date, in order, and record what happened."""

import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.atomic import find_free_path, partial_path, remove_leftovers
from core.errors import RefusedInput
from core.inside import refuse_links
from pipelines.engine.continuation import Change, Continuation
from pipelines.engine.fingerprints import fingerprint, input_identities
from pipelines.engine.manifest import Manifest, current_time
from pipelines.engine.step import Decision, Step, StepFailed, decide, select_until


def run_steps(
    steps: list[Step],
    run: Path,
    manifest: Manifest,
    *,
    until: str | None,
    restart_from: str | None,
    continuation: Continuation | None = None,
    log_line: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Bring every step up to date, in order, as far as `until`. Neighbours that need nothing of each other run at once.

    Args:
        restart_from: compute this step and those after it anew. The same request again, before the run reached its
            end, continues instead of starting over.
        continuation: a step that goes on from a point of its work instead of starting over. The same request again
            resumes it.
        log_line: called with each line that the user should see.
        stop: set when the user interrupted the run. A step that then raises counts as interrupted, not as failed, and
            no other one is started.

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
        starting: list[Job] = []
        for step in group:
            inputs, entry = input_identities(manifest, step), manifest.step(step.name)
            asked = continuation if continuation and continuation.name == step.name else None
            decision = decide_with(asked, step, inputs, entry, run)
            if continuation and step.name in continuation.descends_from and decision.action != "skip":
                raise StepFailed(
                    step.name, f"it would be done anew ({decision.why}), and {continuation.name} could not go on from "
                    f"--continue-from {continuation.at}", run / "logs",
                )  # fmt: skip
            log_line(f"step {numbers[step.name]} of {len(steps)}  {step.name}: {decision.action} ({decision.why})")
            if decision.action == "skip":
                continue
            changes = entry.get("changes", []) if decision.action == "resume" else []
            if decision.action == "continue":
                assert asked is not None
                changes = asked.add_change(step, inputs, entry)
                _check(asked, changes[-1]["changed"], run)
                asked.set_aside()
            # Where the user asked for a step anew, nothing of its former outputs is to be taken over.
            elif decision.action == "run" or (decision.action == "redo" and not step.replaces_outputs):
                archive_outputs(step, run, log_line)
            starting.append(Job(step, inputs, changes))
        _execute_at_once(starting, run, manifest, stop)
        if stop.is_set():
            return
    _remove_leftovers(steps, run, manifest)  # of workers that died, after which a step went on by itself
    manifest.content.pop("restart", None)
    manifest.save()


@dataclass(frozen=True)
class Job:
    """A step that has to run, the identities of its inputs, and the changes on the way of its work."""

    step: Step
    inputs: dict[str, str]
    changes: list[Change]


def _check(continuation: Continuation, changed: list[Change], run: Path) -> None:
    """Check a continuation again, now that its inputs are known. Work has started, so a refusal is a failed step."""
    try:
        continuation.check(changed)
    except RefusedInput as error:
        raise StepFailed(continuation.name, str(error), run / "logs") from error


def decide_with(
    continuation: Continuation | None, step: Step, inputs: dict[str, str], entry: dict[str, Any], run: Path
) -> Decision:
    """Return what a step needs, where it may have been asked to go on from a point of its work.

    Raises:
        StepFailed: it was, and is up to date, which only the new outputs before it have shown.
    """
    decision = decide(step, inputs, entry, run)
    if continuation is None or "fingerprint" not in entry:
        return decision
    if decision.action != "redo" and continuation.is_carried_out(entry):
        return decision
    if decision.action == "skip":
        raise StepFailed(
            step.name,
            f"--continue-from {continuation.at}: {step.name} is done, and nothing that it reads has changed; name the "
            f"stage that is meant, as in sft:{continuation.at}",
            run / "logs",
        )
    return Decision("continue", f"from step {continuation.at}: {decision.why}")


def group_independent(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps in their order, in groups of neighbours of which none needs another of its group."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and not {other.name for other in groups[-1]} & set(step.needs):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _execute_at_once(jobs: Sequence[Job], run: Path, manifest: Manifest, stop: threading.Event) -> None:
    """Execute steps in threads of their own, and wait for all of them.

    Raises:
        StepFailed: that of the first step that failed; the others have ended, too, and what they finished counts.
    """
    failures: dict[str, BaseException] = {}

    def execute(job: Job) -> None:
        try:
            _execute(job, run, manifest, stop)
        except BaseException as error:
            failures[job.step.name] = error

    # Daemons: work that does not end after an interrupt must not keep the process alive.
    threads = [threading.Thread(target=execute, args=(job,), name=job.step.name, daemon=True) for job in jobs[1:]]
    for thread in threads:
        thread.start()
    if jobs:
        execute(jobs[0])
    for thread in threads:
        thread.join()
    for job in jobs:
        if job.step.name in failures:
            raise failures[job.step.name]


def _execute(job: Job, run: Path, manifest: Manifest, stop: threading.Event) -> None:
    step = job.step
    own = fingerprint(step, job.inputs, job.changes)
    record = {"version": step.version, "fingerprint": own, "identity": own, "config": step.config, "inputs": job.inputs}
    record |= {"reads": step.reads} if step.reads else {}
    record |= {"changes": job.changes} if job.changes else {}
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
    facts = {"identity": result.pop("identity", own)} | {key: result.pop(key) for key in ("parts",) if key in result}
    manifest.finish(step.name, "done", **facts, result=result)


def _remove_leftovers(steps: list[Step], run: Path, manifest: Manifest) -> None:
    """Remove what killed processes were writing, except in finished outputs: those are whole, and may be large."""
    done = {run / path for step in steps if manifest.step(step.name)["state"] == "done" for path in step.outputs}
    remove_leftovers(run, skip=done | {run / "stale"})


def _append_traceback(log: Path) -> None:
    """Append the traceback of the exception being handled to a log file, with the time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8", opener=refuse_links) as file:
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
