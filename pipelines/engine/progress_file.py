"""What a step tells about itself while it runs: a small JSON file, and its output in a log."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.engine.manifest import write_json

WRITE_INTERVAL_SECONDS = 0.5


class ProgressFile:
    """The `report(phase, done, total)` callback of a step: writes the latest call to a file, whole, twice a second."""

    def __init__(self, path: Path):
        self.path = path
        self._phase, self._written = "", 0.0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Record that `done` of `total` units of `phase` are behind us; total 0 means unknown."""
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._written < WRITE_INTERVAL_SECONDS:
            return
        self._phase, self._written = phase, now
        write_json(self.path, {"phase": phase, "done": done, "total": total, "time": time.time()})


@contextmanager
def redirect_output(log: Path) -> Iterator[None]:
    """Append stdout and stderr of this process, its native code included, to a file while the block runs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        saved = [os.dup(1), os.dup(2)]
        try:
            _point_output(file.fileno(), file.fileno())
            yield
        finally:
            _point_output(*saved)
            for descriptor in saved:
                os.close(descriptor)


def _point_output(stdout: int, stderr: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
