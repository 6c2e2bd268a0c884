"""Ends what a driver leaves behind: a small process of its own that outlives the driver and cleans up after it.

The kernel kills the processes that Ray started for a driver with it, and Ray's workers leave when their raylet has
gone. A worker that was only starting at that moment waits for a raylet that never comes: this is who ends it.

    python -m pipelines.ray.orphan_reaper MARKER FOLDER      ends when its standard input does, so when the driver does
"""

import os
import shutil
import sys
import time
from pathlib import Path

import psutil

MARKER = "MOBILEMOE_RUN"
"""Environment variable that every process started for a run inherits: `RUN#DRIVER`."""
PATIENCE_SECONDS = 3.0
"""What leaves by itself does so within this time."""


def marker(run: Path) -> str:
    """Value of the variable for processes of this driver."""
    return f"{run}#{os.getpid()}.{time.time_ns()}"


def processes_of(prefix: str) -> list[psutil.Process]:
    """Processes whose marker starts so, without this one: `RUN#` finds those of every driver of a run."""
    found, own = [], os.getpid()
    for process in psutil.process_iter():
        try:
            marked = process.pid != own and process.environ().get(MARKER, "").startswith(prefix)
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # gone meanwhile, or another user's
            continue
    return found


def end_processes_of(prefix: str) -> None:
    """Wait for them to leave, end those that stay.

    Raises:
        RuntimeError: some cannot be ended.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := processes_of(prefix)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    _, alive = psutil.wait_procs(left, timeout=PATIENCE_SECONDS)
    if alive:
        raise RuntimeError(f"processes {[p.pid for p in alive]} of {prefix} do not end; end them by hand")


def main(value: str, folder: Path) -> None:
    """Wait for the driver's end, then end its processes and remove its temporary folder."""
    sys.stdin.read()
    end_processes_of(value)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
