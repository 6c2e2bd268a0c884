"""The run folder's record: recipe, versions, and every step's state, fingerprint, times and error.

`manifest.json` is replaced whole at every change, so a reader never sees half of one. One driver at a time works on a
run folder: it holds a lock on `.lock` that the operating system drops with the process, however it dies.
"""

import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from pipelines.recipe import Recipe, to_dict

LIBRARIES = (
    "torch", "torchtitan", "torchao", "executorch", "ray", "mosaicml-streaming", "datatrove", "lm-eval",
    "transformers", "tokenizers", "numpy",
)  # fmt: skip
LOCK_PATIENCE_SECONDS = 1.0
"""A reader of the lock (`mobilemoe status`) holds it for microseconds; a driver waits that out."""


class RunLocked(RefusedInput):
    """Another driver is running this run folder."""


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file whole: written beside, flushed to the disk, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Manifest:
    """`manifest.json` of one run folder; every method that changes it writes it."""

    def __init__(self, run: Path):
        self.path = run / "manifest.json"
        self.content: dict[str, Any] = {"steps": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def describe(self, recipe: Recipe) -> None:
        """Record what this run is made of, as of now."""
        self.content |= {
            "recipe": to_dict(recipe),
            "versions": {name: version(name) for name in LIBRARIES},
            "git_commit": git_commit(),
            "host": socket.gethostname(),
        }
        self.content.setdefault("created", now())
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.path, self.content)

    def step(self, name: str) -> dict[str, Any]:
        """The entry of a step: at least {"state"}; pending where it never started."""
        return self.content["steps"].get(name, {"state": "pending"})

    def start(self, name: str, record: dict[str, Any]) -> None:
        """A step begins: `record` holds its fingerprint, identity, config and inputs."""
        self.content["steps"][name] = record | {
            "state": "running", "started": now(), "started_unix": time.time(), "host": socket.gethostname(),
        }  # fmt: skip
        self.save()

    def finish(self, name: str, state: str, **facts: Any) -> None:
        """A step ends as done, failed or interrupted; `facts` are its result or its error."""
        entry = self.content["steps"][name]
        entry |= {
            "state": state,
            "finished": now(),
            "seconds": round(time.time() - entry.pop("started_unix"), 1),
        } | facts
        self.save()

    def forget(self, names: list[str]) -> None:
        """Drop the entries of steps that are to be computed anew."""
        for name in names:
            self.content["steps"].pop(name, None)
        self.save()


def git_commit() -> str | None:
    """Commit of the source tree, with "-dirty" for uncommitted changes; None where it is no git checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() or None


@contextmanager
def driver_lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this driver.

    Raises:
        RunLocked: another driver holds it; names its process and host.
    """
    with (run / ".lock").open("a+") as file:
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while not _try_lock(file.fileno(), fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                file.seek(0)
                raise RunLocked(
                    f"{run}: another driver, {file.read().strip()}, is running this run; wait for it or stop it"
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}")
        file.flush()
        yield


def running_driver(run: Path) -> str | None:
    """ "pid N on host H" of the driver that holds the run folder now; None where there is none."""
    path = run / ".lock"
    if not path.exists():
        return None
    with path.open() as file:
        return None if _try_lock(file.fileno(), fcntl.LOCK_SH) else file.read().strip()


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
