"""The orphan reaper: a small process that outlives the driver and ends the processes that the driver left behind.

When a driver is killed, the kernel kills the processes that Ray started for it, and Ray's workers exit when they lose
their raylet. A worker that was just starting at that moment waits for ever for a raylet that is gone. The reaper ends
it, and removes Ray's temporary folder.

    python -m pipelines.ray.orphan_reaper MARKER FOLDER

It waits for the end of its standard input, which is a pipe that only the driver holds: the kernel closes the pipe when
the driver dies, however it dies.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import psutil

MARKER_VARIABLE = "MOBILEMOE_RUN"
"""Environment variable `RUN#DRIVER` that every process started for a run inherits."""
PATIENCE_SECONDS = 3.0
"""Time that processes get to exit by themselves before they are killed."""


def make_marker(run: Path) -> str:
    """Return the value of the variable for the processes of this driver."""
    return f"{run_prefix(run)}{os.getpid()}.{time.time_ns()}"


def run_prefix(run: Path) -> str:
    """Return the beginning of the markers of all drivers of a run."""
    return f"{run}#"


def find_processes(prefix: str) -> list[psutil.Process]:
    """Return the running processes whose marker begins with `prefix`, except this one."""
    found, own = [], os.getpid()
    for process in psutil.process_iter():
        try:
            marked = process.pid != own and process.environ().get(MARKER_VARIABLE, "").startswith(prefix)
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended since, or belongs to another user
            continue
    return found


def end_processes(prefix: str) -> None:
    """Wait until the marked processes have exited, and kill those that have not after PATIENCE_SECONDS.

    Raises:
        RuntimeError: a process survives its SIGKILL.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := find_processes(prefix)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    _, alive = psutil.wait_procs(left, timeout=PATIENCE_SECONDS)
    if alive:
        raise RuntimeError(f"processes {[p.pid for p in alive]} of {prefix} do not end; end them by hand")


def main(marker: str, folder: Path) -> None:
    """Wait for the driver's end, then end its processes and remove its temporary folder."""
    sys.stdin.read()
    try:
        end_processes(marker)
    finally:  # on a machine under load a killed process can take longer to go, and the folder must not stay for it
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
