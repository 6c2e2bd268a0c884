"""One fault tried on a copy of the undisturbed run, as that was before the step, and the record of what was seen."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.faults.end_state import list_differences
from tests.faults.forked import start_driver
from tests.faults.injection import Injection

RECIPE = Path(__file__).with_name("tiny_recipe.py")
ATTEMPTS = 3
"""How often the same command is given before a fault counts as not recovered from."""
PATIENCE_SECONDS = 900.0
GONE_SECONDS = 10.0
"""Time after the end of a driver after which none of its processes may be left."""


class Broken(Exception):
    """A promise was not kept; the message says which."""


@dataclass(frozen=True)
class Fault:
    """One fault, what is promised about it, and how it is made."""

    name: str
    step: str
    """Step in which it happens."""
    promise: str
    disturb: Callable[["Trial"], str]
    """Function that injects the fault, lets the run recover, and returns what was seen."""
    begins: str = ""
    """Snapshot that it begins with; empty: as the undisturbed run was before the step."""


@dataclass
class Trial:
    """A run folder in which one fault is tried."""

    run: Path
    until: str
    options: list[str] = field(default_factory=list)
    """Options of the command besides the recipe's."""
    injected_at: float = 0.0
    """Time of the fault, seconds since the epoch by a clock that no fault changes."""

    @property
    def log(self) -> Path:
        """Return the file with the output of all drivers."""
        return self.run.with_name(f"{self.run.name}.log")

    @property
    def marker(self) -> Path:
        """Return the file that an injection writes."""
        return self.run.with_name(f"{self.run.name}.injected")

    def start(self, injection: Injection | None = None) -> Any:
        """Start the command, with a fault that one of its processes inflicts on itself."""
        words = ["run", str(RECIPE), "--out", str(self.run), "--until", self.until, *self.options]
        return start_driver(words, self.log, injection, self.marker)

    def note_fault(self) -> None:
        """Take this moment as that of the fault."""
        self.injected_at = time.time()

    def wait(self, driver: Any) -> int:
        """Wait for the end of a driver, check that nothing of it is left, and return its exit code.

        Raises:
            Broken: it does not end, or a process of it is still there after GONE_SECONDS.
        """
        driver.join(PATIENCE_SECONDS)
        if driver.exitcode is None:
            end_session(driver.pid)
            raise Broken(f"the command did not end within {PATIENCE_SECONDS:.0f} s")
        deadline = time.monotonic() + GONE_SECONDS
        while left := list_session(driver.pid):
            if time.monotonic() > deadline:
                end_session(driver.pid)
                raise Broken(f"{len(left)} processes were left {GONE_SECONDS:.0f} s after the end of the driver")
            time.sleep(0.05)
        return driver.exitcode

    def inject(self, injection: Injection) -> int:
        """Run the command with an injection, and return its exit code.

        Raises:
            Broken: the moment of the injection never came.
        """
        self.marker.unlink(missing_ok=True)
        code = self.wait(self.start(injection))
        if not self.marker.exists():
            raise Broken(f"nothing was injected: {injection.process} renames no {injection.target}")
        self.injected_at = float(self.marker.read_text())
        return code

    def finish(self) -> str:
        """Give the same command until it ends well, and return its exit codes as text.

        Raises:
            Broken: it does not end well.
        """
        codes: list[int] = []
        while not codes or codes[-1] != 0:
            if len(codes) == ATTEMPTS:
                raise Broken(f"the same command ended with {codes}: {self.read_log_end()}")
            codes.append(self.wait(self.start()))
        return f"the same command again: exit {', '.join(map(str, codes))}"

    def read_log_end(self) -> str:
        """Return the last lines of the drivers' output as one line."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return " ".join(text[-400:].split())


def try_fault(fault: Fault, run: Path, before: Path, reference: Path) -> dict[str, Any]:
    """Try a fault on a copy of `before` at `run`, and return its record.

    Args:
        before: run folder as it was before the fault's step.
        reference: the undisturbed run.
    """
    shutil.rmtree(run.parent, ignore_errors=True)
    shutil.copytree(before, run, symlinks=True)
    trial, began = Trial(run, fault.step), time.time()
    trial.log.unlink(missing_ok=True)
    record: dict[str, Any] = {"name": fault.name, "step": fault.step, "promise": fault.promise}
    try:
        seen = fault.disturb(trial)
        seconds = time.time() - (trial.injected_at or began)
        differences = list_differences(run, reference, fault.step, first=fault.step)
        record |= {"kept": not differences, "seen": f"{seen}; {differences or 'end state the same'}"}
        record |= {"seconds": round(seconds, 1)}
    except Broken as broken:
        record |= {"kept": False, "seen": str(broken), "seconds": None}
    if record["kept"]:
        shutil.rmtree(run)
    return record


def list_session(leader: int) -> list[psutil.Process]:
    """Return the living processes of a driver's session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def end_session(leader: int) -> None:
    """Kill the processes of a driver's session."""
    for process in list_session(leader):
        process.send_signal(signal.SIGKILL)
