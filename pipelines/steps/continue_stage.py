"""Go on from a checkpoint of a training stage with other options: `mobilemoe run --continue-from STEP`.

The checkpoint keeps its weights, moments, step and place in the data. A stage whose mixture or shards are others keeps
the place of every domain whose shards are the same (titan_ext/loader/realign.py). What the stage wrote after that step
moves to `stale/`.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.atomic import find_free_path, partial_path, remove
from core.errors import RefusedInput
from core.json_lines import cut_last_lines
from core.stages import STAGE_FOLDERS, STAGES
from pipelines.engine.continuation import Change, Continuation
from pipelines.engine.fingerprints import identify_output
from pipelines.engine.manifest import Manifest
from pipelines.engine.step import Step, plan_actions
from titan_ext.training.stage_spec import list_finished_checkpoints

CONTINUABLE = (
    "steps", "learning_rate", "schedule", "warmup_steps", "decay_fraction", "min_lr_factor", "weight_decay", "beta2",
    "max_grad_norm", "skip_spikes_sigma", "router_z_loss", "expert_bias_update_rate", "capacity_factor", "shards",
    "mixture",
)  # fmt: skip
"""Fields of a StageConfig that may change on the way: no tensor of a checkpoint depends on them."""


def find_continuation(
    wanted: str, steps: Sequence[Step], run: Path, manifest: Manifest, log_line: Callable[[str], None]
) -> Continuation:
    """Return the request that `--continue-from` makes, checked against all that is known before the run.

    Args:
        wanted: STEP, or STAGE:STEP.

    Raises:
        RefusedInput: it names no stage or no step, the stage has no such checkpoint, or the checkpoint cannot follow
            the changed fields.
    """
    name, _, number = wanted.rpartition(":")
    if not number.isdecimal() or name not in ("", *STAGES):
        raise RefusedInput(
            f"--continue-from {wanted}: give the step of a checkpoint (12000), or stage and step (sft:12000)"
        )
    at, actions = int(number), plan_actions(list(steps), run, manifest)
    name = name or _find_stage(at, actions, manifest)
    step, entry = next(step for step in steps if step.name == name), manifest.step(name)
    continuation = Continuation(
        name, at, check=partial(check_changes, run, step, at), set_aside=partial(set_aside, run, name, at, log_line),
        descends_from=STAGES[: STAGES.index(name)],
    )  # fmt: skip
    if actions[name] in ("skip", "resume") and continuation.is_carried_out(entry):
        return continuation
    if actions[name] == "skip":
        raise RefusedInput(f"--continue-from {wanted}: {name} is done, and nothing of it has changed; change an option")
    if parent := next((other for other in continuation.descends_from if actions[other] in ("redo", "resume")), None):
        raise RefusedInput(
            f"--continue-from {wanted}: {parent} comes before {name} and is not up to date; name a checkpoint of "
            f"{parent}, or finish it as it was"
        )
    require_checkpoint(run, name, at)
    made = {other: manifest.step(other) for other in step.needs if actions[other] == "skip"}
    known = {other: identify_output(entry, step.reads.get(other)) for other, entry in made.items()}
    continuation.check(continuation.list_changed(step, known, entry))
    return continuation


def _find_stage(at: int, actions: dict[str, str], manifest: Manifest) -> str:
    """Return the stage that a step without a stage means: the first one that is not up to date.

    A stage that goes on from this very step already comes before it, so that the same command again means the same.
    """
    for name in STAGES:
        changes = manifest.step(name).get("changes", [])
        if changes and changes[-1]["step"] == at and actions[name] in ("skip", "resume"):
            return name
    return next((name for name in STAGES if actions[name] != "skip"), STAGES[-1])


def require_checkpoint(run: Path, name: str, at: int) -> None:
    """Check that a stage has a finished checkpoint of step `at`.

    Raises:
        RefusedInput: it has none; names those that there are.
    """
    present = list_finished_checkpoints(run / STAGE_FOLDERS[name])
    if at not in present:
        there = f"those of the steps {', '.join(map(str, present))}" if present else "none"
        raise RefusedInput(f"--continue-from {at}: {name} has no checkpoint of this step; there are {there}")


def check_changes(run: Path, step: Step, at: int, changed: list[Change]) -> None:
    """Check that training can go on from the checkpoint of step `at` under the changed fields.

    Raises:
        RefusedInput: it cannot; names the fields, or the checkpoints that there are.
    """
    require_checkpoint(run, step.name, at)
    allowed = tuple(f"stages.{step.name}.{field}" for field in CONTINUABLE)
    fixed = [
        f"{change['field']}: {change['from']!r} -> {change['to']!r}"
        for change in changed
        if change["field"] != "inputs.data" and not _is_part_of(change["field"], allowed)
    ]
    if fixed:
        raise RefusedInput(
            f"--continue-from {at}: no checkpoint of {step.name} can follow {'; '.join(fixed)}. On the way may change "
            f"the data and {', '.join(CONTINUABLE)} of the stage; leave the rest as it was, or start the stage anew "
            "without --continue-from"
        )
    steps = step.config["stages"][step.name]["steps"]
    if steps <= at:
        raise RefusedInput(
            f"stages.{step.name}.steps = {steps}: must be above --continue-from {at}, from which training goes on"
        )


def _is_part_of(field: str, allowed: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in allowed)


def set_aside(run: Path, name: str, at: int, log_line: Callable[[str], None]) -> None:
    """Move the checkpoints of a stage after step `at` to `stale/`, and its logs up to now; the stage keeps their start.

    The logs are copied first, and the checkpoint that training would resume from goes last: after a kill the same
    command does the rest, and another one finds a stage that it can resume.
    """
    folder = run / STAGE_FOLDERS[name]
    stale = find_free_path(run / "stale" / STAGE_FOLDERS[name])
    logs = sorted(folder.glob("*.jsonl"))
    later = [step for step in list_finished_checkpoints(folder) if step > at]
    partial_copy = partial_path(stale)
    remove(partial_copy)
    partial_copy.mkdir(parents=True)
    for log in logs:
        shutil.copy2(log, partial_copy / log.name)
    os.replace(partial_copy, stale)
    (stale / "checkpoint").mkdir()
    for step in later:
        os.replace(folder / "checkpoint" / f"step-{step}", stale / "checkpoint" / f"step-{step}")
    for log in logs:
        cut_last_lines(log, lambda record: record["step"] > at)
    moved = f"{len(later)} checkpoints after step {at}" if later else f"the logs after step {at}"
    log_line(f"  {moved} moved to {stale.relative_to(run)}; delete it when you don't need it")


def find_start(run: Path, name: str) -> int | None:
    """Return the step from which a stage was continued last; None where it never was."""
    changes: list[dict[str, Any]] = Manifest(run).step(name).get("changes", [])
    return changes[-1]["step"] if changes else None
