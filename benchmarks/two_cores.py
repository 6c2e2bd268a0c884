"""The largest gain that a second core of this machine gives: processes that share nothing, each on a core of its own.

    python benchmarks/two_cores.py

It measures how often a second a small workload runs on two cores, over its rate on one. The other benchmarks print
these ratios beside their own "2 cores / 1 core".
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
"""Seconds that a workload runs for one measurement."""
BYTES = bytes(range(256)) * 4096
ARRAY = np.zeros(1 << 25, np.uint8)


def compute() -> None:
    """Do arithmetic in the interpreter, which hardly depends on caches and memory."""
    sum(number * number for number in range(100_000))


def hash_bytes() -> None:
    """Hash a megabyte, which fits the second-level cache, in one call."""
    hashlib.sha256(BYTES).digest()


def compress() -> None:
    """Compress a megabyte: table look-ups and branches, as in tokenizing."""
    zlib.compress(BYTES, 6)


def copy_array() -> None:
    """Copy 32 MB through the memory bus, which both cores share."""
    ARRAY.copy()


WORKLOADS: dict[str, Callable[[], None]] = {
    "Python": compute,
    "sha256": hash_bytes,
    "deflate": compress,
    "memory copy": copy_array,
}


def _count_runs(workload: Callable[[], None], core: int, barrier: Barrier, result: multiprocessing.Queue) -> None:
    os.sched_setaffinity(0, {core})
    workload()  # the first run loads code and touches memory
    barrier.wait()
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        workload()
        runs += 1
    result.put(runs / (time.perf_counter() - started))


def measure_rate(workload: Callable[[], None], cores: list[int]) -> float:
    """Return the workload's runs a second, summed over one process on each of the cores."""
    context = multiprocessing.get_context("fork")
    barrier, result = context.Barrier(len(cores)), context.Queue()
    return sum_results(
        result, [context.Process(target=_count_runs, args=(workload, core, barrier, result)) for core in cores]
    )


def sum_results(result: multiprocessing.Queue, processes: list[BaseProcess]) -> float:
    """Run the processes at once and return the sum of the numbers that each puts into `result`."""
    for process in processes:
        process.start()
    found = sum(result.get() for _ in processes)
    for process in processes:
        process.join()
    return found


def measure_limits(rounds: int = 3) -> dict[str, float]:
    """Return, by workload, the rate on two cores over the rate on one: the median of the rounds."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    return {
        name: statistics.median(
            measure_rate(workload, cores) / measure_rate(workload, cores[:1]) for _ in range(rounds)
        )
        for name, workload in WORKLOADS.items()
    }


def format_limits(rounds: int = 3) -> str:
    """Measure the limits and return them in one line."""
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in measure_limits(rounds).items())
    return f"the machine's own limit, 2 cores / 1 core: {ratios}"


if __name__ == "__main__":
    print(format_limits())
