"""One fault at one named moment of one process: it dies, stops, or its disk is full, when it renames a certain file.

Nearly all that a run must never lose or half write passes through a rename (`core.atomic`), so the moment just before
and just after each of them are the moments worth a kill.
"""

import errno
import fnmatch
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Injection:
    """A fault that one process inflicts on itself, once, however often that process is started again."""

    process: str
    """Name of the process: driver, a step's task (items, export.int4) or a rank (pretrain.rank1); a shell pattern."""
    target: str
    """Shell pattern of the new name of the file or folder that is renamed."""
    action: Literal["kill", "kill-driver", "stop", "term", "full", "memory", "forward", "back"]
    """SIGKILL, SIGKILL of the driver, SIGSTOP, SIGTERM of the driver; ENOSPC; no more memory for this process; a jump
    of its clock by a day."""
    after: bool = False
    """Whether it happens after the rename; before it otherwise."""
    number: int = 1
    """Which of the renames that match."""


class Injector:
    """Carries out one injection in the process that it names, and writes the time of it to a file."""

    def __init__(self, injection: Injection, marker: Path, driver: int):
        self._injection, self._marker, self._driver, self._seen = injection, marker, driver, 0

    def enter(self, process: str) -> None:
        """Watch the renames of this process if it is the one that the injection names."""
        if not fnmatch.fnmatchcase(process, self._injection.process):
            return
        os.replace, os.rename = self._wrap(os.replace), self._wrap(os.rename)

    def _wrap(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            matches = fnmatch.fnmatchcase(os.path.basename(os.fspath(target)), self._injection.target)
            self._seen += matches
            is_due = matches and self._seen == self._injection.number and not self._marker.exists()
            if is_due and not self._injection.after:
                self._act()
            rename(source, target, **options)
            if is_due and self._injection.after:
                self._act()

        return renamed

    def _act(self) -> None:
        self._marker.write_text(repr(time.time()))
        match self._injection.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill-driver":
                os.kill(self._driver, signal.SIGKILL)
                time.sleep(600)  # this process goes with the driver
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "term":
                os.kill(self._driver, signal.SIGTERM)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "memory":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (used, used))
            case way:
                clock, shift = time.time, 86_400 if way == "forward" else -86_400
                time.time = lambda: clock() + shift
