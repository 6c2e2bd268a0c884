"""`ProgressFile`: the latest progress of a running step in a small JSON file, for `mobilemoe status`."""

import time
from pathlib import Path

from core.atomic import write_json

WRITE_INTERVAL_SECONDS = 0.5


class ProgressFile:
    """A `core.progress.Progress` callback that writes its latest call to a file, at most twice a second.

    The first call of a phase and the one that ends it are always written.
    """

    def __init__(self, path: Path):
        self.path = path
        self._phase, self._written = "", 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Record that `done` of `total` units of `phase` are finished; a total of 0 is unknown."""
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._written < WRITE_INTERVAL_SECONDS:
            return
        self._phase, self._written = phase, now
        write_json(self.path, {"phase": phase, "done": done, "total": total, "time": time.time()})
