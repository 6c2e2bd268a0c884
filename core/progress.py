"""The progress callback that every long-running function takes."""

import sys
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total): `done` of `total` units of `phase` are finished; a total of 0 is unknown."""


def ignore_progress(phase: str, done: int, total: int) -> None:
    """Do nothing with it."""


def print_progress(phase: str, done: int, total: int) -> None:
    """Print one line on stderr."""
    print(f"{phase} {done}/{total}", file=sys.stderr)
