"""Show the status of a run: as a table, as one line, and live while the run goes on."""

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from core.printable import make_line
from core.secret_keys import hide_keys
from pipelines.printing import PlainConsole
from pipelines.status import RunStatus, StepStatus, read_status

LINE_INTERVAL_SECONDS = 10.0
"""Time between two progress lines where the output is no terminal."""
LIVE_INTERVAL_SECONDS = 0.5
"""Time between two updates of the table on a terminal."""
COLOURS = {"running": "cyan", "done": "green", "failed": "red", "interrupted": "yellow", "stale": "yellow"}


def format_table(status: RunStatus) -> RenderableType:
    """Return the status as a table with a row a step; recipe and run stand above it, errors below it."""
    notes = [f"driver: {status.driver}" if status.driver else "no driver at work"]
    notes += [f"{step.name}: {step.error.strip().splitlines()[-1]}" for step in status.steps if step.error.strip()]
    table = Table()
    for column in ("step", "state", "progress", "tokens", "loss", "tokens/s", "time", "left"):
        left = column in ("step", "state", "progress")
        table.add_column(column, justify="left" if left else "right", no_wrap=column != "progress")
    for step in status.steps:
        table.add_row(
            step.name, step.state, _format_progress(step),
            _format_number(step.tokens, ","), _format_number(step.loss, ".4f"),
            _format_number(step.tokens_per_second, ",.0f"),
            format_duration(step.seconds), format_duration(step.seconds_left), style=COLOURS.get(step.state, "dim"),
        )  # fmt: skip
    # A title of the table would be broken at the table's width, and a path with it.
    return Group(make_line(f"{status.recipe}  {status.run}"), table, *(make_line(note) for note in notes))


def format_line(status: RunStatus) -> str:
    """Return the running steps in one line; an empty string if no step is running."""
    total = len(status.steps)
    running = [
        _format_step(number, total, step) for number, step in enumerate(status.steps, 1) if step.state == "running"
    ]
    return "  |  ".join(running)


def _format_step(number: int, total: int, step: StepStatus) -> str:
    parts = [f"step {number} of {total}  {step.name}", _format_progress(step)]
    if step.loss is not None:
        parts += [f"{step.tokens:,} tokens", f"loss {step.loss:.4f}", f"{step.tokens_per_second:,.0f} tokens/s"]
    parts += [f"{format_duration(step.seconds_left)} left"] if step.seconds_left is not None else []
    return "  ".join(part for part in parts if part)


def _format_progress(step: StepStatus) -> str:
    if step.done is None or not step.total:
        return step.phase
    return f"{step.phase} {step.done:,}/{step.total:,} ({step.done / step.total:.0%})".strip()


def _format_number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def format_duration(seconds: float | None) -> str:
    """Return h:mm:ss, or an empty string for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Display:
    """Shows a run while it goes on, on stderr: a live table on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, run: Path, until: str | None = None):
        """Make a display of a run folder.

        Args:
            until: last step to show; None shows all.
        """
        self.run, self.until = run, until
        self.console = PlainConsole(stderr=True)
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._next, self._last = time.monotonic() + LINE_INTERVAL_SECONDS, ""

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def log_line(self, text: str) -> None:
        """Print a line that stays above the table, without keys."""
        self.console.print(make_line(hide_keys(text)), soft_wrap=True)

    def refresh(self) -> None:
        """Read the run folder and show its status, if the interval since the last time is over."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (LIVE_INTERVAL_SECONDS if self._live else LINE_INTERVAL_SECONDS)
        status = read_status(self.run)
        if self.until:
            names = [step.name for step in status.steps]
            status = replace(status, steps=status.steps[: names.index(self.until) + 1])
        if self._live:
            self._live.update(format_table(status), refresh=True)
        elif (text := format_line(status)) and text != self._last:
            self._last = text
            self.log_line(text)
