"""A request to a stage to stop: a SIGTERM to any rank, or a file that the driver writes."""

import signal
import threading
import time
from pathlib import Path

LOOK_SECONDS = 1.0
"""Time between two looks for the file, which may lie on a shared file system."""


class StopRequest:
    """Knows whether this rank was asked to stop. The ranks agree in `StageCheckpoints.agree`."""

    def __init__(self, file: Path | None):
        """Create a request that is not made yet.

        Args:
            file: file whose appearance asks to stop; None looks for none.
        """
        self._file = file
        self._is_made = False
        self._next_look = 0.0
        self._former_handler: object = None

    def listen(self) -> None:
        """Take SIGTERM as a request from now on. A thread other than the main one cannot, and looks for the file only.

        Ray runs the function of a worker in such a thread: its driver asks by the file.
        """
        if threading.current_thread() is threading.main_thread() and self._former_handler is None:
            self._former_handler = signal.signal(signal.SIGTERM, self._note)

    def close(self) -> None:
        """Leave SIGTERM to who had it before. It may be called again, and from any thread."""
        if self._former_handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._former_handler)  # type: ignore[arg-type]  # what signal.signal returned
            self._former_handler = None

    def is_made(self) -> bool:
        """Return whether this rank was asked to stop."""
        now = time.monotonic()
        if not self._is_made and self._file is not None and now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            self._is_made = self._file.exists()
        return self._is_made

    def _note(self, number: int, frame: object) -> None:
        self._is_made = True
        self.close()  # a second one does what it did before: a stage that hangs can still be ended
