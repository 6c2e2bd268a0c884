"""`mobilemoe status`: the steps of a run and how far they are."""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.live import Live

from core.errors import RefusedInput
from pipelines.commands import inputs
from pipelines.commands.command import emit_result
from pipelines.display import format_table
from pipelines.printing import PlainConsole
from pipelines.status import read_status

WATCH_SECONDS = 2.0
"""Time between two refreshes of --watch."""


@dataclass(frozen=True)
class Status:
    """Steps, progress, tokens, loss and time left of a run; works while it runs."""

    run: tyro.conf.Positional[Path]
    json: bool = False
    """One JSON object on stdout."""
    watch: bool = False
    """Refresh until the driver has ended."""


def show_status(arguments: Status) -> None:
    """Print the status of a run once, or until its driver has ended.

    Raises:
        RefusedInput: the folder holds no run, or both --watch and --json are given.
    """
    if arguments.watch and arguments.json:
        raise RefusedInput("--watch --json: a watch has no single answer; drop one of them")
    inputs.require_run_folder(arguments.run)
    status = read_status(arguments.run)
    if not arguments.watch:
        emit_result(arguments.json, status.to_dict(), lambda: format_table(status))
        return
    # Without a thread that refreshes: a Ctrl-C while it starts would be lost.
    with Live(format_table(status), console=PlainConsole(), auto_refresh=False) as live:
        while status.driver:
            time.sleep(WATCH_SECONDS)
            status = read_status(arguments.run)
            live.update(format_table(status), refresh=True)
