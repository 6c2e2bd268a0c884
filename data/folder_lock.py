"""The lock on the folder that the data step writes: one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import RefusedInput
from core.inside import refuse_links
from core.lease import NO_FLOCK, LeaseHeld, hold_lease


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Keep other processes from writing to `out`.

    The kernel releases the lock of a process that dies, so a killed run blocks no later one.

    Raises:
        RefusedInput: another process writes to it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    refusal = RefusedInput(
        f"{out} is being written by another process; wait until it has ended, or name another folder"
    )
    with open(path, "w", opener=refuse_links) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refusal from error
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            with _hold_lease(out / ".lease", refusal):
                yield
            return
        # A process that ended between our open and our lock has removed this file: to lock it keeps nobody out.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(lock.fileno())):
            raise refusal
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def _hold_lease(path: Path, refusal: RefusedInput) -> Iterator[None]:
    """Keep other processes out on a file system without locks."""
    try:
        with hold_lease(path):
            yield
    except LeaseHeld as error:
        raise refusal from error
