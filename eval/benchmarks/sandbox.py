"""`run_untrusted`: Python code that a model has written, in a process that can neither read, reach nor keep anything.

Linux alone: namespaces, resource limits and a root folder of its own (`sandbox_child.py`). Where the system gives no
namespaces, nothing is run at all.
"""

import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from core.errors import RefusedInput

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 60.0
"""Time for the sandbox itself, on a busy machine."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Limits:
    """Bounds of a piece of code: `seconds`, `disk_bytes` and `output_bytes` for all of it, the others for a process."""

    seconds: float = 10.0
    """Time by the clock, for all of it."""
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    """Address space of a process."""
    processes: int = 16
    """Number of processes and threads."""
    disk_bytes: int = 16 << 20
    """Size of /tmp, which lies in memory, and of any file."""
    output_bytes: int = 1 << 16
    """Size of stdout and stderr together; the code is ended when it writes more."""


@dataclass(frozen=True)
class Outcome:
    """How a piece of code ended."""

    exit_code: int
    """128 + N where signal N ended it."""
    output: str
    """stdout and stderr."""
    ended_by: str = ""
    """`time` or `output` where one of these limits ended it."""

    @property
    def passed(self) -> bool:
        """Whether the code ran to its end without an error."""
        return self.exit_code == 0 and not self.ended_by


def run_untrusted(code: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program in a sandbox and return how it ended.

    Raises:
        RefusedInput: this system gives no sandbox. The code was not run.
    """
    number = os.getpid() << 8 | next(_numbers) % 256
    reader, writer = os.pipe()
    spec = asdict(limits) | {"number": number, "report": writer}
    command = [sys.executable, "-I", "-S", str(CHILD), json.dumps(spec)]
    with os.fdopen(reader, "rb") as report, tempfile.TemporaryFile() as source:
        source.write(code.encode(errors="surrogatepass"))
        source.seek(0)
        try:
            process = subprocess.Popen(
                command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd="/",
                pass_fds=(writer,), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writer)
        with process:
            try:
                refusal = _wait_for_start(report)
                output, ended_by = _read_output(process, limits)
            finally:
                # Process 1 of the namespace dies with its parent, and all others with it.
                process.send_signal(signal.SIGKILL)
    if refusal:
        raise RefusedInput(
            f"generated code cannot be run: {refusal}; allow user namespaces (sysctl user.max_user_namespaces, "
            "kernel.apparmor_restrict_unprivileged_userns), or leave out the tasks that run code"
        )
    exit_code = process.returncode
    text = output.decode(errors="replace")
    return Outcome(exit_code if exit_code >= 0 else 128 - exit_code, text, ended_by)


def _wait_for_start(report: IO[bytes]) -> str:
    """Wait until the sandbox has started the code, which closes `report`, and return what it could not do."""
    with selectors.DefaultSelector() as selector:
        selector.register(report, selectors.EVENT_READ)
        if not selector.select(START_SECONDS):
            return f"the sandbox did not start within {START_SECONDS:.0f} s"
    return report.read().decode(errors="replace")


def _read_output(process: subprocess.Popen, limits: Limits) -> tuple[bytes, str]:
    """Read what the code prints until it ends, writes too much or takes too long, and return which of these."""
    assert process.stdout is not None
    deadline, output = time.monotonic() + limits.seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return output, ""
            output += part
            if len(output) > limits.output_bytes:
                return output[: limits.output_bytes], "output"
    return output, "time"
