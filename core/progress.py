"""Define the progress callback that every long-running function takes."""

import sys
from collections.abc import Callable

from core.printable import make_line

Progress = Callable[[str, int, int], None]
"""Function that is called as progress(phase, done, total): `done` of `total` units of `phase` are finished.

A total of 0 means that the total is unknown.
"""


def ignore_progress(phase: str, done: int, total: int) -> None:
    """Do nothing with the report. Functions that take a `Progress` use it by default."""


def print_progress(phase: str, done: int, total: int) -> None:
    """Print `phase done/total` as one line on stderr. Stdout is kept for results."""
    print(make_line(f"{phase} {done}/{total}"), file=sys.stderr)
