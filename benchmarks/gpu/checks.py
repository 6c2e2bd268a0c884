"""The checks of a GPU, in the order in which they run, and the process that runs one of them.

    python -m benchmarks.gpu.checks NAME --save FILE [--toy]

A check is a process of its own: a fault of the device, or a lack of memory, ends that check alone.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.atomic import write_json

Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Check:
    """A check runs in a process of its own."""

    part: str
    """`ceilings`, `correctness`, `throughput` or `profile`."""
    needs: int
    """Seconds that it takes, roughly, with its start and compilation; it is not begun when fewer are left. The
    numbers are assumed, not measured on a GPU."""
    run: Callable[[Save, Path, bool], None]
    """It does the work; it gets a function that saves results, a scratch folder, and whether to run at toy size."""
    on_cpu: bool = False
    """Whether it runs without seeing a GPU."""


def run_ceilings(save: Save, folder: Path, toy: bool) -> None:
    """Measure the most that this device reaches."""
    from benchmarks.gpu.ceilings import measure_ceilings

    measure_ceilings(save, toy)


def run_correctness(save: Save, folder: Path, toy: bool) -> None:
    """Compare trainings on this device with float64."""
    from benchmarks.gpu.correctness import check_training

    check_training(save, folder, toy)


def run_qat_bits(save: Save, folder: Path, toy: bool) -> None:
    """Compare QAT's weights with those of the exporter."""
    from benchmarks.gpu.correctness import check_qat_bits

    check_qat_bits(save, toy)


def run_throughput(flavor: str, seq_len: int, **changes: Any) -> Callable[[Save, Path, bool], None]:
    """Return the function of a check that measures a training."""

    def run(save: Save, folder: Path, toy: bool) -> None:
        from benchmarks.gpu.throughput import measure_throughput

        measure_throughput(save, _describe(flavor, seq_len, toy, **changes), folder, steps=3 if toy else 5)

    return run


def run_profile(save: Save, folder: Path, toy: bool) -> None:
    """Profile the kernels of a step."""
    from benchmarks.gpu.throughput import profile_kernels

    profile_kernels(save, _describe("S", 2048, toy, micro_batches=1, capacity_factor=1.5), folder)


def _describe(flavor: str, seq_len: int, toy: bool, micro_batches: int = 8, **changes: Any) -> Any:
    """Return a `one_rank.Training`: 16,384 tokens a micro-batch, and 8,192 where no token is dropped at 8,192."""
    from benchmarks.gpu.one_rank import TOY, TOY_SEQ_LEN, describe_training
    from titan_ext.config import FLAVORS

    if toy:
        sizes = {"seq_len": TOY_SEQ_LEN, "local_batch_size": 2, "micro_batches": min(micro_batches, 2)}
        return describe_training(TOY, **sizes, **changes)
    tokens = 8192 if seq_len == 8192 and "capacity_factor" not in changes else 16_384
    return describe_training(
        FLAVORS[flavor], seq_len=seq_len, local_batch_size=tokens // seq_len, micro_batches=micro_batches, **changes
    )


DROPPING = {"capacity_factor": 1.5}
CHECKS = {
    "ceilings": Check("ceilings", 40, run_ceilings),
    "S 2,048 capacity": Check("throughput", 90, run_throughput("S", 2048, **DROPPING)),
    "QAT bits": Check("correctness", 30, run_qat_bits),
    "training, on this device": Check("correctness", 90, run_correctness),
    "training, on the CPU": Check("correctness", 40, run_correctness, on_cpu=True),
    "kernels of S 2,048": Check("profile", 50, run_profile),
    "S 2,048 capacity, selective recomputation": Check(
        "throughput", 70, run_throughput("S", 2048, activation_checkpoint="selective", **DROPPING)
    ),
    "S 2,048 capacity, float8": Check("throughput", 90, run_throughput("S", 2048, float8=True, **DROPPING)),
    "S 8,192 capacity": Check("throughput", 80, run_throughput("S", 8192, **DROPPING)),
    "M 2,048 capacity": Check("throughput", 90, run_throughput("M", 2048, **DROPPING)),
    "S 8,192 QAT": Check("throughput", 80, run_throughput("S", 8192, quantize=True)),
    "S 8,192 dropless": Check("throughput", 70, run_throughput("S", 8192)),
    "S 2,048 dropless": Check("throughput", 70, run_throughput("S", 2048)),
    "S 2,048 capacity, not compiled": Check("throughput", 70, run_throughput("S", 2048, compile=False, **DROPPING)),
}
PARTS = tuple(dict.fromkeys(check.part for check in CHECKS.values()))


def run_one(name: str, path: Path, toy: bool) -> None:
    """Run a check in this process, and write what it finds and how it ended to the JSON file `path`."""
    record: dict[str, Any] = {"status": "unfinished", "found": {}}

    def save(found: dict[str, Any]) -> None:
        record["found"] = found
        write_json(path, record)

    with tempfile.TemporaryDirectory() as folder:
        try:
            CHECKS[name].run(save, Path(folder), toy)
            record["status"] = "skipped" if "skipped" in record["found"] else "done"
        except Exception as error:
            record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            record["traceback"] = traceback.format_exc()
            print(record["traceback"], file=sys.stderr)
        write_json(path, record)


def main() -> None:
    """Run the check that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CHECKS)
    parser.add_argument("--save", type=Path, required=True, help="JSON file, written anew with every result")
    parser.add_argument("--toy", action="store_true", help="run at the size of a test")
    arguments = parser.parse_args()
    run_one(arguments.name, arguments.save, arguments.toy)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an orderly end would wait for the loader's thread, which may be in the middle of a batch


if __name__ == "__main__":
    main()
