"""The run folder's record: recipe, versions, and every step's state, fingerprint, times and error.

`manifest.json` is replaced atomically at every change, so a reader never sees half of it.
"""

import json
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from core.atomic import write_json
from core.errors import report_damage
from core.secret_keys import hide_keys
from pipelines.recipe import Recipe, to_dict

LIBRARIES = (
    "torch", "torchtitan", "torchao", "executorch", "ray", "mosaicml-streaming", "datatrove", "lm-eval",
    "transformers", "tokenizers", "numpy",
)  # fmt: skip
"""Distributions whose versions the manifest records: those whose code can change a result."""


def current_time() -> str:
    """Return the time in UTC as ISO 8601 with whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Manifest:
    """`manifest.json` of one run folder. Every method that changes it also writes it, and several threads may do so."""

    def __init__(self, run: Path):
        self._lock = threading.Lock()
        self._began: dict[str, float] = {}
        """Step -> its start on a clock that nobody sets: that of the machine may jump while a step runs."""
        self.path = run / "manifest.json"
        self.content: dict[str, Any] = {"steps": {}}
        if self.path.exists():
            with report_damage(self.path, "copy it from a backup, or start in another folder"):
                content = json.loads(self.path.read_text(encoding="utf-8"))
                steps = {name: {**entry} for name, entry in content.get("steps", {}).items()}
                self.content = {**content, "steps": steps}

    def describe(self, recipe: Recipe) -> None:
        """Record the recipe, library versions, commit and host that the run has from now on."""
        self.content |= {
            "recipe": to_dict(recipe),
            "versions": {name: version(name) for name in LIBRARIES},
            "git_commit": find_git_commit(),
            "host": socket.gethostname(),
        }
        self.content.setdefault("created", current_time())
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        write_json(self.path, self.content)

    def step(self, name: str) -> dict[str, Any]:
        """Return the entry of a step. It has at least the key "state", which is pending if the step never started."""
        return self.content["steps"].get(name, {"state": "pending"})

    def start(self, name: str, record: dict[str, Any]) -> None:
        """Record that a step begins.

        Args:
            record: version, fingerprint, identity, config and inputs of the step, and the changes on its way.
        """
        with self._lock:
            self._began[name] = time.monotonic()
            before = self.content["steps"].get(name, {})
            # A step that goes on keeps its attempts; one that was killed has no end, and so no seconds.
            goes_on = before.get("fingerprint") == record["fingerprint"] or "changes" in record
            attempts = before.get("attempts", []) if goes_on else []
            self.content["steps"][name] = record | {
                "state": "running", "started": current_time(), "started_unix": time.time(),
                "host": socket.gethostname(),
                "attempts": [*attempts, {"started": current_time(), "state": "killed", "seconds": None}],
            }  # fmt: skip
            self.save()

    def finish(self, name: str, state: str, **facts: Any) -> None:
        """Record that a step ended.

        Args:
            state: done, failed or interrupted.
            facts: the step's identity and result, or its error.
        """
        if "error" in facts:
            facts["error"] = hide_keys(facts["error"])
        with self._lock:
            entry = self.content["steps"][name]
            entry.pop("started_unix")
            seconds = round(time.monotonic() - self._began.pop(name), 1)
            entry["attempts"][-1] |= {"state": state, "seconds": seconds}
            entry |= {"state": state, "finished": current_time(), "seconds": seconds} | facts
            self.save()

    def forget(self, names: list[str]) -> None:
        """Remove the entries of steps that are to be computed anew."""
        for name in names:
            self.content["steps"].pop(name, None)
        self.save()


def find_git_commit() -> str | None:
    """Return the commit of the source tree, with "-dirty" for uncommitted changes; None outside of a git checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() or None
