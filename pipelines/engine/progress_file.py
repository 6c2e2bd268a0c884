"""`ProgressFile`: the latest progress of a running step in a small JSON file, for `mobilemoe status`."""

import time
from pathlib import Path

from core.atomic import write_json

WRITE_INTERVAL_SECONDS = 0.5


class ProgressFile:
    """A `core.progress.Progress` callback that writes its latest call to a file, at most twice a second.

    The first call of a phase and the one that ends it are always written. The time left is the units left over the
    speed since the first call with this total: a step that resumes does not count what it found.
    """

    def __init__(self, path: Path):
        self.path = path
        self._phase, self._written = "", 0.0
        self._first: tuple[int, int, float] | None = None
        """Total, units done and time of the first call with this total."""
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Record that `done` of `total` units of `phase` are finished; a total of 0 is unknown."""
        now = time.monotonic()
        if self._first is None or total != self._first[0] or done < self._first[1]:
            self._first = (total, done, now)
        if phase == self._phase and done < total and now - self._written < WRITE_INTERVAL_SECONDS:
            return
        self._phase, self._written = phase, now
        _, before, since = self._first
        left = round((now - since) / (done - before) * (total - done), 1) if before < done < total else None
        write_json(self.path, {"phase": phase, "done": done, "total": total, "time": time.time(), "seconds_left": left})
