"""Faults of a whole run on a real Ray: each kind of its processes is killed, at random times and at named moments.

One run is disturbed many times, so that most faults meet a run that has just recovered from another one. Each fault has
a record of its own, with the time until the run had done something new; the end state is compared at the end of all.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from core.stages import STAGE_FOLDERS
from tests.faults.end_state import find_living, list_differences
from tests.faults.trial import GONE_SECONDS, RECIPE

KINDS: dict[str, tuple[str, int]] = {
    "driver": ("pipelines.cli run", signal.SIGKILL), "raylet": ("raylet/raylet ", signal.SIGKILL),
    "GCS": ("gcs_server", signal.SIGKILL), "rank": ("ray::RayTrainWorker", signal.SIGKILL),
    "task": ("ray::_run_logged", signal.SIGKILL), "dashboard": ("dashboard/dashboard.py", signal.SIGKILL),
    "dashboard agent": ("dashboard/agent.py", signal.SIGKILL), "log monitor": ("log_monitor.py", signal.SIGKILL),
    "runtime env agent": ("runtime_env/agent/main.py", signal.SIGKILL),
    "Ray Train's controller": ("ray::TrainController", signal.SIGKILL), "reaper": ("orphan_reaper", signal.SIGKILL),
    "rank, SIGSTOP": ("ray::RayTrainWorker", signal.SIGSTOP), "driver, SIGTERM": ("pipelines.cli run", signal.SIGTERM),
}  # fmt: skip
"""Kind of process -> part of its command line, and the signal."""
SILENCE_SECONDS = 600.0
"""Time without anything new after which a run counts as not recovered: the driver is ended then."""


class Disturbed:
    """A run on Ray, its driver, and the faults that it has met."""

    def __init__(self, run: Path, until: str):
        self.run, self.until = run, until
        self._driver: subprocess.Popen | None = None
        self.codes: list[int] = []
        self._log = run.with_name(f"{run.name}.log").open("ab")

    def start(self) -> None:
        """Give the command."""
        words = ["-W", "ignore", "-m", "pipelines.cli", "run", str(RECIPE), "--out", str(self.run)]
        words += ["--until", self.until, "--cluster.hang-minutes", "1", "--cluster.max-failures", "20"]
        self._driver = subprocess.Popen(
            [sys.executable, *words], stdout=self._log, stderr=self._log, start_new_session=True,
            env=os.environ | {"RAY_worker_niceness": "0"},
        )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        """Return whether the driver has ended."""
        assert self._driver is not None
        return self._driver.poll() is not None

    def measure(self) -> tuple[int, ...]:
        """Return numbers that grow with what is finished: steps of the run, training steps, parts of items and data."""
        manifest = self.run / "manifest.json"
        steps = json.loads(manifest.read_text())["steps"] if manifest.exists() else {}
        done = sum(entry["state"] == "done" for entry in steps.values())
        trained = sum(
            len((self.run / folder / "metrics.jsonl").read_bytes().splitlines())
            for folder in STAGE_FOLDERS.values()
            if (self.run / folder / "metrics.jsonl").exists()
        )
        parts = [*self.run.glob("items.partial/*"), *self.run.glob("data.partial/work/logs/*/completions/*")]
        return done, trained, len(parts)

    def wait(self, seconds: float) -> int | None:
        """Wait so long, or until the driver ends; give the command again unless it ended well. Return its exit code."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.has_ended:
                self.end()
                if self.codes[-1] != 0:
                    self.start()
                return self.codes[-1]
            time.sleep(0.2)
        return None

    def find(self, kind: str) -> psutil.Process | None:
        """Return a living process of a kind, a random one of several."""
        found = [p for p in find_living(self.run) if KINDS[kind][0] in _describe(p)]
        return random.choice(found) if found else None

    def hit(self, kind: str) -> bool:
        """Send the signal to a process of a kind; return whether there was one."""
        process = self.find(kind)
        if process is None:
            return False
        process.send_signal(KINDS[kind][1])
        return True

    def recover(self) -> tuple[float | None, str]:
        """Wait until something new is finished, and give the command again where the driver has ended.

        Returns:
            the seconds that it took, None if it did not come; and what was seen.
        """
        began, before, seen = time.monotonic(), self.measure(), []
        last = began
        while self.measure() <= before:
            if self.has_ended:
                seen.append(self.end())
                if self.codes[-1] == 0 or len(seen) > 8:
                    break
                seen.append("given again")
                self.start()
                last = time.monotonic()
            if time.monotonic() - last > SILENCE_SECONDS:
                self._driver.kill()
                return None, "; ".join([*seen, f"nothing new for {SILENCE_SECONDS:.0f} s"])
            time.sleep(0.2)
        return time.monotonic() - began, "; ".join(seen) or "went on by itself"

    def end(self) -> str:
        """Take the exit code of the driver that has ended, and say how long its processes were still there."""
        assert self._driver is not None
        self.codes.append(self._driver.wait())
        began = time.monotonic()
        while (left := find_living(self.run)) and time.monotonic() - began < 60:
            time.sleep(0.2)
        seconds = time.monotonic() - began
        gone = f"nothing alive after {seconds:.1f} s"
        if left:
            gone = f"**{len(left)} processes alive after 60 s: {', '.join(sorted({_describe(p)[:30] for p in left}))}**"
        elif seconds > GONE_SECONDS:
            gone = f"**nothing alive after {seconds:.1f} s only**"
        return f"exit {self.codes[-1]}, {gone}"


def disturb(run: Path, reference: Path, until: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Disturb a whole run up to `count` times, and yield a record of each fault and one of the end state."""
    generator, disturbed, number = random.Random(seed), Disturbed(run, until), 0
    disturbed.start()
    while number < count and disturbed.wait(generator.uniform(3, 40)) != 0:
        kinds = [kind for kind in KINDS if disturbed.find(kind)]
        if not kinds:
            continue
        number += 1
        kind, before = generator.choice(kinds), disturbed.measure()
        if not disturbed.hit(kind):
            continue
        seconds, seen = disturbed.recover()
        yield {
            "name": f"random {seed}.{number}: {kind} after {before[0]} steps and {before[1]} training steps",
            "step": until, "promise": "recovered from; nothing alive 10 s after the end of a driver", "seen": seen,
            "kept": seconds is not None and "**" not in seen, "seconds": None if seconds is None else round(seconds, 1),
        }  # fmt: skip
    while disturbed.wait(SILENCE_SECONDS) != 0:
        disturbed.recover()
    differences = list_differences(run, reference, until)
    yield {
        "name": f"random {seed}: end state after all {number}", "step": until, "promise": "as the undisturbed run",
        "seen": str(differences or "the same"), "kept": not differences, "seconds": None,
    }  # fmt: skip


def _describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
