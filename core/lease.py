"""`hold_lease`: one process at a time holds a path, on a file system that has no flock (Lustre without `-o flock`).

A lease is a file that its holder renews every few seconds. Whoever finds one that belongs to a process of this host
looks whether that process lives. Of another host's, it watches whether the file changes: clocks of two hosts are never
compared. A holder that was stopped for so long that another process took its lease is ended.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from core.atomic import write_json

RENEW_SECONDS = 5.0
"""Time between two renewals."""
STALE_SECONDS = 60.0
"""Time without a renewal after which a lease of another host may be taken."""
POLL_SECONDS = 0.5
NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""Errors of flock that say that the file system has no locks."""


class LeaseHeld(Exception):
    """Another process holds the lease; the message says which."""


@contextmanager
def hold_lease(path: Path) -> Iterator[None]:
    """Hold a lease while the block runs, and renew it.

    Raises:
        LeaseHeld: a living process holds it. This may take STALE_SECONDS to see.
    """
    own = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "boot": read_boot_id()}
    while not _create(path, own):
        seen = read_lease(path)
        if seen is not None and not is_gone(seen) and _is_renewed(path, seen):
            raise LeaseHeld(describe_holder(read_lease(path) or seen))
        if seen is not None:
            _take_away(path, seen)
    ended = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, own, ended), name="lease", daemon=True)
    renewer.start()
    try:
        yield
    finally:
        ended.set()
        renewer.join()
        if (read_lease(path) or {}).get("owner") == own["owner"]:
            path.unlink()


@contextmanager
def hold_lock(file: IO, lease: Path) -> Iterator[None]:
    """Wait for flock on an open file, or for a lease where the file system has no locks, and hold it for the block."""
    with ExitStack() as held:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            while True:
                try:
                    held.enter_context(hold_lease(lease))
                    break
                except LeaseHeld:
                    time.sleep(POLL_SECONDS)
        yield


def read_lease(path: Path) -> dict[str, Any] | None:
    """Return what a lease says; an empty dict while it is being made, None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def is_gone(lease: dict[str, Any]) -> bool:
    """Return whether the holder was a process of this host that has ended, or ran before its last start."""
    if lease.get("host") != socket.gethostname():
        return False
    return lease.get("boot") != read_boot_id() or not is_alive(int(lease.get("pid", 0)))


def describe_holder(lease: dict[str, Any]) -> str:
    """Return "pid N on host H"."""
    return f"pid {lease.get('pid')} on host {lease.get('host')}"


def read_boot_id() -> str:
    """Return an id that changes when this host starts again; empty where the system has none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def is_alive(pid: int) -> bool:
    """Return whether a process of this host has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _create(path: Path, own: dict[str, Any]) -> bool:
    """Make the file if there is none; only one of several processes does."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(own | {"renewed": 0}, file)
    except FileExistsError:
        return False
    return True


def _is_renewed(path: Path, seen: dict[str, Any]) -> bool:
    """Watch a lease, and return True when it changes, False where it has not for STALE_SECONDS or is away."""
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        now = read_lease(path)
        if now is None or is_gone(now):
            return False
        if now != seen:
            return True
        time.sleep(POLL_SECONDS)
    return False


def _take_away(path: Path, seen: dict[str, Any]) -> None:
    """Remove a lease that nobody renews, if it is still the one that was seen.

    Whoever removes one holds a second file meanwhile, so that no two processes look and remove at once: the second
    would remove the lease that the first has just made. A second file that stays is of a process killed just then.
    """
    removing = path.with_name(f"{path.name}.removing")
    own = {"owner": uuid.uuid4().hex}
    if not _create(removing, own):
        other = read_lease(removing)
        if other is not None and not _is_renewed(removing, other) and read_lease(removing) == other:
            removing.unlink(missing_ok=True)
        return
    try:
        if read_lease(path) == seen:
            path.unlink(missing_ok=True)
    finally:
        removing.unlink(missing_ok=True)


def _renew(path: Path, own: dict[str, Any], ended: threading.Event) -> None:
    renewed = 0
    while not ended.wait(RENEW_SECONDS):
        holder = read_lease(path)
        if holder is None or holder.get("owner") != own["owner"]:
            end_process()
            return
        renewed += 1
        write_json(path, own | {"renewed": renewed})


def end_process() -> None:
    """End this process, as a user would: it was stopped for long, and another one works in the folder now."""
    os.kill(os.getpid(), signal.SIGTERM)
