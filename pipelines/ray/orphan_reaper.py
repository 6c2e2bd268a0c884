"""The orphan reaper: a small process that outlives the driver and ends the processes that the driver left behind.

When a driver is killed, the kernel kills the processes that Ray started for it, and Ray's workers exit when they lose
their raylet. A worker that was just starting at that moment waits for ever for a raylet that is gone. The reaper ends
it, and removes the temporary folders of Ray and of the run.

    python -m pipelines.ray.orphan_reaper MARKER FOLDER ...

It waits for the end of its standard input, which is a pipe that only the driver holds: the kernel closes the pipe when
the driver dies, however it dies.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

MARKER_VARIABLE = "MOBILEMOE_RUN"
"""Environment variable `DRIVER#RUN` that every process started for a run inherits."""
PATIENCE_SECONDS = 3.0
"""Time that processes get to exit by themselves before they are killed."""
SECOND_LOOK_SECONDS = 1.0
"""Time after which it is looked again, where there were processes."""
KILL_SECONDS = 60.0
"""Time that killed processes get to go. On a machine under load the kernel takes seconds to free their memory."""


def make_marker(run: Path) -> str:
    """Return the value of the variable for the processes of this driver: `PID.TIME#RUN`, the time in nanoseconds."""
    # The run stands last, since a path may hold any character: `r#1` is another run than `r`.
    return f"{os.getpid()}.{time.time_ns()}#{run}"


def find_processes(run: Path | str, driver: str = "") -> list[psutil.Process]:
    """Return the running processes of a run, except this one.

    Args:
        driver: `PID.TIME` of the driver that started them; processes of any driver if empty.
    """
    found, own = [], os.getpid()
    for process in psutil.process_iter():
        try:
            started_by, _, belongs_to = process.environ().get(MARKER_VARIABLE, "").partition("#")
            marked = process.pid != own and belongs_to == str(run) and driver in ("", started_by)
            if marked and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended since, or belongs to another user
            continue
    return found


def end_processes(run: Path | str, driver: str = "") -> bool:
    """Wait until the processes of a run have exited, and kill those that have not after PATIENCE_SECONDS.

    It looks again after every round: a process may have started another before it was killed.

    Args:
        driver: as `find_processes`.

    Returns:
        whether there were any.

    Raises:
        RuntimeError: a process is still there KILL_SECONDS later.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    found = bool(left := find_processes(run, driver))
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = find_processes(run, driver)
    deadline = time.monotonic() + KILL_SECONDS
    while left:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"processes {[p.pid for p in left]} of {run} are still there {KILL_SECONDS:.0f} s after they were "
                "killed: the system does not let them go (a disk or a network that does not answer?)"
            )
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1)
        left = find_processes(run, driver)
    return found


def main(marker: str, folders: Sequence[Path]) -> None:
    """Wait for the driver's end, then end its processes and remove its temporary folders."""
    sys.stdin.read()
    driver, _, run = marker.partition("#")
    found = True
    while found:
        try:
            found = end_processes(run, driver)
        finally:  # on a machine under load a killed process can take longer to go, and the folders must not stay for it
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        # A process that is being started has no environment for a moment. It may make the folder anew.
        time.sleep(SECOND_LOOK_SECONDS if found else 0)


if __name__ == "__main__":
    main(sys.argv[1], [Path(word) for word in sys.argv[2:]])
