"""The lock on a run folder: one driver at a time works on it.

The lock is flock(2) on RUN/.lock. The operating system releases it when the process ends, however it ends, so a driver
that was killed never leaves a run folder locked. On a file system without flock it is a lease, RUN/.lease
(`core.lease`).
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import RefusedInput
from core.inside import refuse_links
from core.lease import NO_FLOCK, LeaseHeld, describe_holder, hold_lease, is_gone, read_lease

LOCK, LEASE = ".lock", ".lease"

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
    with open(run / LOCK, "a+", opener=refuse_links) as file:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (is_held := _try_lock(file.fileno(), fcntl.LOCK_EX)) is False:
            if time.monotonic() > deadline:
                file.seek(0)
                raise _refuse(run, file.read().strip())
            time.sleep(RETRY_SECONDS)
        if is_held is None:
            with _hold_lease(run):
                yield
            return
        # The file is truncated only now: until here it named the driver that held the lock.
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield


@contextmanager
def _hold_lease(run: Path) -> Iterator[None]:
    try:
        with hold_lease(run / LEASE):
            yield
    except LeaseHeld as error:
        raise _refuse(run, str(error)) from error


def _refuse(run: Path, holder: str) -> RunLocked:
    return RunLocked(f"{run}: another driver, {holder}, is running this run; wait for it or stop it")


def find_driver(run: Path) -> str | None:
    """Return "pid N on host H" of the driver that holds the run folder now; None where there is none.

    Without flock, a driver of another host that was killed is still named until another one takes its lease.
    """
    path = run / LOCK
    if not path.exists():
        return None
    with path.open() as file:
        # A shared lock is granted only if no driver holds the exclusive one; it is released when the file is closed.
        is_free = _try_lock(file.fileno(), fcntl.LOCK_SH)
        if is_free is not None:
            return None if is_free else file.read().strip()
    lease = read_lease(run / LEASE)
    return describe_holder(lease) if lease and not is_gone(lease) else None


def _try_lock(descriptor: int, kind: int) -> bool | None:
    """Return whether the lock is granted; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    return True
