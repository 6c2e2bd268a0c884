"""`Step`, one node of the graph of a run, and the decision whether it has to run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.engine.fingerprints import describe_changes, fingerprint, input_identities
from pipelines.engine.manifest import Manifest

Result = dict[str, Any] | None


@dataclass(frozen=True)
class Step:
    """One node of the graph of a run."""

    name: str
    version: int
    """Code version of the step. Raise it when the same inputs would now give another output."""
    needs: tuple[str, ...]
    """Names of the steps whose outputs this one reads."""
    config: dict[str, Any]
    """Everything that identifies the step's work, JSON-ready; nothing that only says where or how fast it runs."""
    outputs: tuple[str, ...]
    """Files and folders below the run folder that exist when, and only when, the step is done. A training stage is the
    exception: its folder exists from the first checkpoint on."""
    work: Callable[[], Result]
    """Function that does the work. It may find its own outputs of an interrupted run, never outputs of another
    fingerprint. Its result goes to the manifest; the key `identity` in it replaces the fingerprint that dependent steps
    see, and `parts` states an identity for each part of the output."""
    reads: dict[str, str] = field(default_factory=dict)
    """Input -> the part of its output that this step reads. An input that is absent is read as a whole."""
    replaces_outputs: bool = False
    """Whether the work itself replaces former outputs, once the new ones are whole: it takes parts of them over, or
    others read them meanwhile. Otherwise they are moved away before it begins."""


@dataclass(frozen=True)
class Decision:
    """The action that a step needs, and the reason."""

    action: Literal["skip", "resume", "continue", "run", "redo"]
    why: str


class StepFailed(RuntimeError):
    """A step did not finish; the same command resumes the run."""

    def __init__(self, step: str, error: str, logs: Path):
        self.step, self.logs = step, logs
        super().__init__(error)


def decide(step: Step, inputs: dict[str, str], entry: dict[str, Any], run: Path) -> Decision:
    """Compare a step with its entry in the manifest and with its outputs on the disk.

    Args:
        inputs: identity of each step in `step.needs`.
        entry: the manifest's entry of the step.
    """
    if "fingerprint" not in entry:
        return Decision("run", "not run yet")
    if entry["fingerprint"] != fingerprint(step, inputs, entry.get("changes", ())):
        return Decision("redo", "; ".join(describe_changes(step, inputs, entry)))
    if entry["state"] != "done":
        return Decision("resume", f"it was {entry['state']}")
    missing = [output for output in step.outputs if not (run / output).exists()]
    return Decision("redo", f"{', '.join(missing)} is gone") if missing else Decision("skip", "up to date")


def plan_actions(steps: list[Step], run: Path, manifest: Manifest) -> dict[str, str]:
    """Return what would happen to each step if all were brought up to date now: run, redo, resume or skip.

    A step whose inputs are still to be made counts as one that is run.
    """
    actions: dict[str, str] = {}
    for step in steps:
        if all(actions[name] == "skip" for name in step.needs):
            inputs = input_identities(manifest, step)
            actions[step.name] = decide(step, inputs, manifest.step(step.name), run).action
        else:
            actions[step.name] = "run"
    return actions


def list_pending(
    steps: list[Step], run: Path, manifest: Manifest, until: str | None, restart_from: str | None
) -> set[str]:
    """Return the steps that `run_steps` would execute now; arguments are those of that function."""
    actions, names = plan_actions(steps, run, manifest), [step.name for step in steps]
    is_begun = manifest.content.get("restart") == restart_from  # then the restart continues
    first_anew = names.index(restart_from) if restart_from and not is_begun else len(names)
    chosen = [step.name for step in select_until(steps, until)]
    return {name for i, name in enumerate(chosen) if i >= first_anew or actions[name] != "skip"}


def is_up_to_date(steps: list[Step], run: Path, manifest: Manifest, until: str | None) -> bool:
    """Return whether every step as far as `until` would be skipped."""
    return all(
        decide(step, input_identities(manifest, step), manifest.step(step.name), run).action == "skip"
        for step in select_until(steps, until)
    )


def select_until(steps: list[Step], until: str | None) -> list[Step]:
    """Return the steps from the first one to `until`, which is included; all of them where `until` is None."""
    return steps[: [step.name for step in steps].index(until) + 1] if until else steps
