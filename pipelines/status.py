"""`RunStatus`: the state of a run, read from its folder alone: manifest, progress files and metrics."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import RefusedInput, report_damage
from core.stages import STAGE_FOLDERS
from pipelines.engine.fingerprints import find_stale_steps
from pipelines.engine.manifest import Manifest
from pipelines.engine.run_lock import find_driver
from pipelines.steps import STEPS

TAIL_BYTES = 1 << 16
"""Bytes at the end of a metrics file that are read for its last record; a record has a few hundred."""


@dataclass(frozen=True)
class StepStatus:
    """The state of one step."""

    name: str
    state: str
    """pending, running, done, stale, failed or interrupted."""
    seconds: float | None = None
    """Time that the step took, or has taken so far."""
    phase: str = ""
    done: int | None = None
    """Finished units of the phase, or finished optimizer steps of a training stage."""
    total: int | None = None
    """All units of the phase, or all optimizer steps."""
    tokens: int | None = None
    """Tokens that a training stage has trained on."""
    loss: float | None = None
    """Training loss in nats a token at the last logged step."""
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    """Estimate from what is left, and the last logged speed of a training stage or the speed of the phase so far."""
    error: str = ""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run at one moment."""

    run: str
    recipe: str
    driver: str | None
    """Process and host of the driver that is at work, if one is."""
    steps: tuple[StepStatus, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the status as nested dicts, JSON-ready."""
        return asdict(self)


def require_run(run: Path) -> None:
    """Check that a folder is a run folder.

    Raises:
        RefusedInput: the folder has no manifest.json.
    """
    if not (run / "manifest.json").exists():
        raise RefusedInput(f"{run}: no manifest.json, so no run; give the folder that `mobilemoe run --out` named")


def read_status(run: Path) -> RunStatus:
    """Read the status of a run; works while the run goes on.

    Raises:
        RefusedInput: the folder holds no run.
        DamagedData: its manifest, or another file of it, is damaged.
    """
    require_run(run)
    with report_damage(run, "a file of it says something else than this program writes"):
        return _read_run(run)


def _read_run(run: Path) -> RunStatus:
    manifest, driver = Manifest(run), find_driver(run)
    stale = find_stale_steps(manifest)
    recipe = manifest.content["recipe"]
    steps = tuple(_read_step(run, name, manifest.step(name), recipe, driver, name in stale) for name in STEPS)
    return RunStatus(str(run), recipe["name"], driver, steps)


def _read_step(
    run: Path, name: str, entry: dict[str, Any], recipe: dict[str, Any], driver: str | None, stale: bool
) -> StepStatus:
    state = entry["state"]
    if state == "running" and driver is None:
        state = "interrupted"  # its driver was killed before it could record that
    if state == "done" and stale:
        state = "stale"
    seconds = entry.get("seconds")
    if state == "running":
        seconds = round(time.time() - entry["started_unix"], 1)
    error = entry.get("error", "")
    if name in STAGE_FOLDERS and state != "pending":
        return _read_training(run, name, state, seconds, recipe["stages"][name], error)
    if state != "running":
        return StepStatus(name, state, seconds, error=error)
    jobs = _read_progress(run / "progress" / name, entry["started_unix"])
    active = [job for job in jobs if job["done"] < job["total"] or not job["total"]] or jobs[-1:]
    phase = ", ".join(f"{job['name']}: {job['phase']}" if len(jobs) > 1 else job["phase"] for job in active)
    longest = max((job["seconds_left"] for job in active if job.get("seconds_left")), default=None)
    if len(active) == 1:
        job = active[0]
        return StepStatus(name, state, seconds, phase, job["done"], job["total"], seconds_left=longest)
    return StepStatus(name, state, seconds, phase, seconds_left=longest)


def _read_progress(folder: Path, since: float) -> list[dict[str, Any]]:
    """Return the last progress of each of the step's jobs, oldest first; that of an earlier attempt is left out.

    Args:
        since: time when this attempt started, in seconds since the epoch.
    """
    jobs = [json.loads(path.read_text()) | {"name": path.stem} for path in folder.glob("[!.]*.json")]
    return sorted((job for job in jobs if job["time"] >= since), key=lambda job: job["time"])


def _read_training(
    run: Path, name: str, state: str, seconds: float | None, stage: dict[str, Any], error: str
) -> StepStatus:
    running = state == "running"
    last = read_last_record(run / STAGE_FOLDERS[name] / "metrics.jsonl")
    if last is None:
        return StepStatus(name, state, seconds, "starting" if running else "", 0, stage["steps"], error=error)
    tokens_left = (stage["steps"] - last["step"]) * stage["global_batch_size"] * stage["seq_len"]
    speed = last["tokens_per_second"]
    return StepStatus(
        name, state, seconds, "training" if running else "", last["step"], stage["steps"], last["tokens"],
        last["loss"], speed, round(tokens_left / speed, 1) if running and speed else None, error,
    )  # fmt: skip


def read_last_record(path: Path) -> dict[str, Any] | None:
    """Return the last complete record of a JSON-lines file that may be growing; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        # What follows the last line feed is a record that is being written.
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else None
