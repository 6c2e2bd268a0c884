"""What a second core of this machine gives at most: processes that share nothing, each on a core of its own.

    python benchmarks/two_cores.py

The other benchmarks print it beside their own "2 cores / 1 core".
"""

import hashlib
import multiprocessing
import os
import statistics
import time
import zlib
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier

import numpy as np

SECONDS = 0.7
BYTES = bytes(range(256)) * 4096
ARRAY = np.zeros(1 << 25, np.uint8)


def python() -> None:
    """Arithmetic of the interpreter: caches and memory hardly matter."""
    sum(number * number for number in range(100_000))


def sha256() -> None:
    """A megabyte in one go, of the second-level cache."""
    hashlib.sha256(BYTES).digest()


def deflate() -> None:
    """Table look-ups and branches, as tokenizing has them."""
    zlib.compress(BYTES, 6)


def copy() -> None:
    """32 MB through the memory bus, which both cores share."""
    ARRAY.copy()


WORKS: dict[str, Callable[[], None]] = {"Python": python, "sha256": sha256, "deflate": deflate, "memory copy": copy}


def _count(work: Callable[[], None], core: int, barrier: Barrier, result: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {core})
    work()
    barrier.wait()
    started, times = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        work()
        times += 1
    result.put(times / (time.perf_counter() - started))


def rate(work: Callable[[], None], cores: list[int]) -> float:
    """Times a second, summed over one process on each of the cores."""
    context = multiprocessing.get_context("fork")
    barrier, result = context.Barrier(len(cores)), context.Queue()
    return total(result, [context.Process(target=_count, args=(work, core, barrier, result)) for core in cores])


def total(result: multiprocessing.Queue, processes: list[BaseProcess]) -> float:
    """The sum of what these processes, run at once, each put into `result`."""
    for process in processes:
        process.start()
    found = sum(result.get() for _ in processes)
    for process in processes:
        process.join()
    return found


def limits(rounds: int = 3) -> dict[str, float]:
    """By work: the rate of two cores over that of one, the median of the rounds."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    return {
        name: statistics.median(rate(work, cores) / rate(work, cores[:1]) for _ in range(rounds))
        for name, work in WORKS.items()
    }


def table(rounds: int = 3) -> str:
    """One line."""
    found = ", ".join(f"{name} {ratio:.2f}" for name, ratio in limits(rounds).items())
    return f"the machine's own limit, 2 cores / 1 core: {found}"


if __name__ == "__main__":
    print(table())
