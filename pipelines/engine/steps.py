"""The step engine: what is done, what was cut off, what is stale, and why.

A step's fingerprint is a hash of (its code version, its config, its inputs' identities). The manifest keeps it with
the config it was made from, so a step that is not up to date can say what changed.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.engine.manifest import Manifest

Result = dict[str, Any] | None


@dataclass(frozen=True)
class Step:
    """One node of the graph."""

    name: str
    version: int
    """Code version tag: raised when the same inputs would give another output."""
    needs: tuple[str, ...]
    """Steps whose outputs this one reads."""
    config: dict[str, Any]
    """What identifies the step's work, JSON-ready; nothing that only says where or how fast it runs."""
    outputs: tuple[str, ...]
    """Files and folders below the run folder that exist when, and only when, the step is done (training: has begun)."""
    work: Callable[[], Result]
    """Does the work. It may find outputs of its own from a run that was cut off, never outputs of another fingerprint.
    Its result goes to the manifest; a key `identity` in it replaces the fingerprint in what dependents see."""


@dataclass(frozen=True)
class Decision:
    """What to do with a step, and why."""

    action: Literal["skip", "resume", "run", "redo"]
    why: str


class StepFailed(RuntimeError):
    """A step did not finish; the run can be resumed."""

    def __init__(self, step: str, error: str):
        self.step = step
        super().__init__(error)


def fingerprint(step: Step, inputs: dict[str, str]) -> str:
    """16 hex digits that change with the step's version, config or inputs."""
    return digest({"step": step.name, "version": step.version, "config": step.config, "inputs": inputs})


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def decide(step: Step, inputs: dict[str, str], entry: dict[str, Any], run: Path) -> Decision:
    """Compare a step with its entry in the manifest and its outputs on the disk."""
    if "fingerprint" not in entry:
        return Decision("run", "not run yet")
    if entry["fingerprint"] != fingerprint(step, inputs):
        return Decision("redo", "; ".join(changes(step, inputs, entry)))
    if entry["state"] != "done":
        return Decision("resume", f"it was {entry['state']}")
    gone = [output for output in step.outputs if not (run / output).exists()]
    return Decision("redo", f"{', '.join(gone)} is gone") if gone else Decision("skip", "up to date")


def up_to_date(steps: list[Step], run: Path, manifest: Manifest, until: str | None) -> bool:
    """Whether every step as far as `until` would be skipped."""
    return all(
        decide(step, identities(manifest, step.needs), manifest.step(step.name), run).action == "skip"
        for step in _as_far_as(steps, until)
    )


def _as_far_as(steps: list[Step], until: str | None) -> list[Step]:
    return steps[: [step.name for step in steps].index(until) + 1] if until else steps


def changes(step: Step, inputs: dict[str, str], entry: dict[str, Any]) -> list[str]:
    """What differs between a step and its entry, one phrase a difference."""
    found = []
    if entry["version"] != step.version:
        found.append(f"code version {entry['version']} -> {step.version}")
    old, new = _leaves(entry["config"]), _leaves(step.config)
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            found.append(f"{path}: {old.get(path)!r} -> {new.get(path)!r}")
    found += [f"input {name} changed" for name, value in inputs.items() if entry["inputs"].get(name) != value]
    return found


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {dotted path: leaf}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf for key, item in value.items() for path, leaf in _leaves(item, f"{prefix}.{key}".lstrip(".")).items()
    }


def identities(manifest: Manifest, names: tuple[str, ...]) -> dict[str, str]:
    """What the named steps made, as their dependents see it."""
    return {name: manifest.step(name)["identity"] for name in names}


def stale_steps(manifest: Manifest) -> set[str]:
    """Done steps whose recorded inputs are not what those inputs are now."""
    steps, stale = manifest.content["steps"], set()
    for name, entry in steps.items():
        recorded = entry.get("inputs", {})
        if any(steps.get(n, {}).get("identity") != identity or n in stale for n, identity in recorded.items()):
            stale.add(name)
    return stale


def run_steps(
    steps: list[Step],
    run: Path,
    manifest: Manifest,
    *,
    until: str | None,
    restart_from: str | None,
    say: Callable[[str], None],
    stop: threading.Event,
) -> None:
    """Bring every step up to date, in order, as far as `until`.

    Args:
        restart_from: compute this step and those after it anew. The same request again, before the run reached its
            end, continues instead of starting over.
        say: takes one line for the person who watches.
        stop: set by an interrupt: a step that then ends in an exception counts as interrupted, not as failed.

    Raises:
        StepFailed: a step raised; the manifest holds its traceback.
    """
    names = [step.name for step in steps]
    steps = _as_far_as(steps, until)
    if restart_from and manifest.content.get("restart") != restart_from:
        manifest.content["restart"] = restart_from
        manifest.forget(names[names.index(restart_from) :])
    for number, step in enumerate(steps, 1):
        inputs = identities(manifest, step.needs)
        decision = decide(step, inputs, manifest.step(step.name), run)
        say(f"step {number} of {len(steps)}  {step.name}: {decision.action} ({decision.why})")
        if decision.action == "skip":
            continue
        if decision.action != "resume":
            set_aside(step, run, say)
        _execute(step, inputs, manifest, stop)
    manifest.content.pop("restart", None)
    manifest.save()


def _execute(step: Step, inputs: dict[str, str], manifest: Manifest, stop: threading.Event) -> None:
    own = fingerprint(step, inputs)
    record = {"version": step.version, "fingerprint": own, "identity": own, "config": step.config, "inputs": inputs}
    manifest.start(step.name, record)
    try:
        result = step.work() or {}
    except BaseException as error:
        if stop.is_set():
            manifest.finish(step.name, "interrupted")
        else:
            manifest.finish(step.name, "failed", error=f"{type(error).__name__}: {error}")
        raise StepFailed(step.name, str(error)) from error
    manifest.finish(step.name, "done", identity=result.pop("identity", own), result=result)


def set_aside(step: Step, run: Path, say: Callable[[str], None]) -> None:
    """Move a step's former outputs to `stale/`, in place of what an earlier change left there; drop its partials."""
    for output in step.outputs:
        path = run / output
        _remove(partial_of(path))
        if path.exists():
            aside = run / "stale" / output
            _remove(aside)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside)
            say(f"  former {output} moved to stale/{output}; delete it when you don't need it")


def partial_of(path: Path) -> Path:
    """Where an output is written before it is whole."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def whole(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write a file or a folder to; rename it when the block ends without an exception.

    Args:
        keep: leave what a former, cut-off block wrote there, for work that resumes in it; else it is removed.
    """
    partial = partial_of(path)
    if not keep:
        _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
