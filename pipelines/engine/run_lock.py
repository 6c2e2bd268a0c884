"""The lock on a run folder: one driver at a time works on it.

The lock is flock(2) on RUN/.lock. The operating system releases it when the process ends, however it ends, so a driver
that was killed never leaves a run folder locked. A file system without flock gives no protection.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import RefusedInput

PATIENCE_SECONDS = 1.0
"""Time that a driver waits for the lock. `mobilemoe status` takes it for microseconds, to see whether one has it."""
RETRY_SECONDS = 0.05


class RunLocked(RefusedInput):
    """Another driver is working on this run folder."""


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder for this process while the block runs.

    Raises:
        RunLocked: another driver holds it; the message names its process and host.
    """
    with (run / ".lock").open("a+") as file:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _try_lock(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                file.seek(0)
                raise RunLocked(
                    f"{run}: another driver, {file.read().strip()}, is running this run; wait for it or stop it"
                )
            time.sleep(RETRY_SECONDS)
        # The file is truncated only now: until here it named the driver that held the lock.
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield


def find_driver(run: Path) -> str | None:
    """Return "pid N on host H" of the driver that holds the run folder now; None where there is none."""
    path = run / ".lock"
    if not path.exists():
        return None
    with path.open() as file:
        # A shared lock is granted only if no driver holds the exclusive one; it is released when the file is closed.
        return None if _try_lock(file.fileno(), fcntl.LOCK_SH) else file.read().strip()


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
