"""Compares the processor time of a function on two texts."""

import time
from collections.abc import Callable

ROUNDS = 5


def measure_growth(work: Callable[[str], object], short: str, long: str) -> float:
    """Return the time of the long text over that of the short one, each the fastest of some runs.

    Times below a tenth of a millisecond count as that much: there the timer decides.
    """

    def measure(text: str) -> float:
        started = time.process_time()
        work(text)
        return time.process_time() - started

    short_time, long_time = (max(min(measure(text) for _ in range(ROUNDS)), 1e-4) for text in (short, long))
    return long_time / short_time
