"""Counts the rows and documents that a task sets aside, by reason, and keeps samples of every reason."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

SAMPLES_PER_REASON = 10
"""Largest number of samples of one reason that a task keeps."""
SAMPLE_CHARS = 10_000
"""Largest number of characters of a sample; a longer one is cut."""
MAX_REASONS = 100
"""Largest number of distinct reasons that a task counts; what comes after them counts as OTHER."""
OTHER = "other reasons"


class SetAside:
    """A context manager that counts what one task sets aside, and writes samples of it to `path`.

    `path` gets a JSON line `{"reason", "sample", ...}` for the first SAMPLES_PER_REASON of every reason. It does not
    exist where nothing was set aside.

    Attributes:
        counts: reason -> number of rows or documents, samples or not.
    """

    def __init__(self, path: Path):
        self.path = path
        self.counts: Counter[str] = Counter()
        self._file: TextIO | None = None

    def __enter__(self) -> "SetAside":
        self.path.unlink(missing_ok=True)  # of an attempt that was cut off
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, reason: str, sample: str, **where: Any) -> None:
        """Count one row or document.

        Args:
            reason: words that many rows share, without the row's own values.
            sample: the row or document as text.
            where: what else to write with the sample, for example row=17.
        """
        if reason not in self.counts and len(self.counts) >= MAX_REASONS:
            reason = OTHER
        self.counts[reason] += 1
        if self.counts[reason] <= SAMPLES_PER_REASON:
            line = {"reason": reason, **where, "sample": sample[:SAMPLE_CHARS]}
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("w", encoding="utf-8")
            # ASCII: a lone surrogate in the sample could not be written in UTF-8.
            self._file.write(json.dumps(line) + "\n")
