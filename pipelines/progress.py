"""Where a run stands, read from its folder alone: manifest, progress files, metrics. The live display and
`mobilemoe status` print the same thing."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from core.errors import RefusedInput
from pipelines.engine.manifest import Manifest, running_driver
from pipelines.engine.steps import stale_steps
from pipelines.steps.graph import STAGE_FOLDERS, STEPS

TAIL_BYTES = 1 << 16
LINE_INTERVAL_SECONDS = 10.0
"""Between two progress lines where the output is no terminal."""
LIVE_INTERVAL_SECONDS = 0.5


@dataclass(frozen=True)
class StepStatus:
    """One line of the table."""

    name: str
    state: str
    """pending, running, done, stale, failed or interrupted."""
    seconds: float | None = None
    phase: str = ""
    done: int | None = None
    total: int | None = None
    """Units of the phase, or optimizer steps of a stage."""
    tokens: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    error: str = ""


@dataclass(frozen=True)
class RunStatus:
    """A run folder at one moment."""

    run: str
    recipe: str
    driver: str | None
    """Process and host of the driver that is at work, if one is."""
    steps: tuple[StepStatus, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def read_status(run: Path) -> RunStatus:
    """Read a run folder; works while the run goes on.

    Raises:
        RefusedInput: the folder holds no run.
    """
    if not (run / "manifest.json").exists():
        raise RefusedInput(f"{run}: no manifest.json, so no run; give the folder that `mobilemoe run --out` named")
    manifest, driver = Manifest(run), running_driver(run)
    stale = stale_steps(manifest)
    recipe = manifest.content["recipe"]
    steps = tuple(_step_status(run, name, manifest.step(name), recipe, driver, name in stale) for name in STEPS)
    return RunStatus(str(run), recipe["name"], driver, steps)


def _step_status(run: Path, name: str, entry: dict, recipe: dict, driver: str | None, stale: bool) -> StepStatus:
    state = entry["state"]
    if state == "running" and driver is None:
        state = "interrupted"  # its driver was killed before it could say so
    if state == "done" and stale:
        state = "stale"
    seconds = entry.get("seconds")
    if state == "running":
        seconds = round(time.time() - entry["started_unix"], 1)
    error = entry.get("error", "")
    if name in STAGE_FOLDERS and state != "pending":
        return _training_status(run, name, state, seconds, recipe["stages"][name], error)
    if state != "running":
        return StepStatus(name, state, seconds, error=error)
    parts = _parts(run / "progress" / name, entry["started_unix"])
    active = [part for part in parts if part["done"] < part["total"] or not part["total"]] or parts[-1:]
    phase = ", ".join(f"{part['name']}: {part['phase']}" if len(parts) > 1 else part["phase"] for part in active)
    if len(active) == 1:
        return StepStatus(name, state, seconds, phase, active[0]["done"], active[0]["total"])
    return StepStatus(name, state, seconds, phase)


def _parts(folder: Path, since: float) -> list[dict]:
    """What the step's tasks last reported, oldest report first; reports of an earlier attempt don't count."""
    parts = [json.loads(path.read_text()) | {"name": path.stem} for path in folder.glob("[!.]*.json")]
    return sorted((part for part in parts if part["time"] >= since), key=lambda part: part["time"])


def _training_status(run: Path, name: str, state: str, seconds: float | None, stage: dict, error: str) -> StepStatus:
    last = last_line(run / STAGE_FOLDERS[name] / "metrics.jsonl")
    if last is None:
        return StepStatus(
            name, state, seconds, "starting" if state == "running" else "", 0, stage["steps"], error=error
        )
    tokens_left = (stage["steps"] - last["step"]) * stage["global_batch_size"] * stage["seq_len"]
    left = (
        round(tokens_left / last["tokens_per_second"], 1) if state == "running" and last["tokens_per_second"] else None
    )
    return StepStatus(
        name, state, seconds, "training" if state == "running" else "", last["step"], stage["steps"], last["tokens"],
        last["loss"], last["tokens_per_second"], left, error,
    )  # fmt: skip


def last_line(path: Path) -> dict | None:
    """Last complete record of a JSON-lines file that may be growing; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1]) if lines else None


def table(status: RunStatus) -> Table:
    """The run as a table for people."""
    notes = [f"driver: {status.driver}" if status.driver else "no driver at work"]
    notes += [f"{step.name}: {step.error.strip().splitlines()[-1]}" for step in status.steps if step.error.strip()]
    view = Table(
        title=f"{status.recipe}  {status.run}",
        caption=escape("\n".join(notes)),
        title_justify="left",
        caption_justify="left",
    )
    for column in ("step", "state", "progress", "tokens", "loss", "tokens/s", "time", "left"):
        left = column in ("step", "state", "progress")
        view.add_column(column, justify="left" if left else "right", no_wrap=column != "progress")
    colours = {"running": "cyan", "done": "green", "failed": "red", "interrupted": "yellow", "stale": "yellow"}
    for step in status.steps:
        view.add_row(
            step.name, step.state, _progress(step),
            _number(step.tokens, ","), _number(step.loss, ".4f"), _number(step.tokens_per_second, ",.0f"),
            duration(step.seconds), duration(step.seconds_left), style=colours.get(step.state, "dim"),
        )  # fmt: skip
    return view


def line(status: RunStatus) -> str:
    """The running step in one line."""
    for number, step in enumerate(status.steps, 1):
        if step.state == "running":
            parts = [f"step {number} of {len(status.steps)}  {step.name}", _progress(step)]
            if step.loss is not None:
                parts += [f"{step.tokens:,} tokens", f"loss {step.loss:.4f}", f"{step.tokens_per_second:,.0f} tokens/s"]
            parts += [f"{duration(step.seconds_left)} left"] if step.seconds_left is not None else []
            return "  ".join(part for part in parts if part)
    return ""


def _progress(step: StepStatus) -> str:
    if not step.total:
        return step.phase
    return f"{step.phase} {step.done:,}/{step.total:,} ({step.done / step.total:.0%})".strip()


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def duration(seconds: float | None) -> str:
    """h:mm:ss, or an empty string for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Display:
    """Shows a run while it goes on: a live table on a terminal, a line every ten seconds elsewhere; on stderr."""

    def __init__(self, run: Path):
        self.run = run
        self.console = Console(stderr=True, soft_wrap=True)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._next, self._last = time.monotonic() + LINE_INTERVAL_SECONDS, ""

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, highlight=False)

    def refresh(self) -> None:
        """Look at the run folder and show it, if it is time."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (LIVE_INTERVAL_SECONDS if self._live else LINE_INTERVAL_SECONDS)
        status = read_status(self.run)
        if self._live:
            self._live.update(table(status), refresh=True)
        elif (text := line(status)) and text != self._last:
            self._last = text
            self.say(text)
