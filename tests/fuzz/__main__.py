"""Run every target at length and print the table of inputs: `python -m tests.fuzz [--inputs N] [--only WORD]`.

A finding is printed with the target's name and the input's number, and its traceback; the exit code is then 1. The same
number gives the same input again.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.eval.tiny_checkpoint import write_bf16_folder
from tests.fuzz.cpp import fuzz_kernels
from tests.fuzz.targets import TARGETS, make_model_targets
from tests.fuzz.text_targets import make_text_targets

MOST_FINDINGS = 20
"""Findings of a target after which it ends."""


def main() -> int:
    """Run the targets in turn, each for the same number of inputs, the slow ones for fewer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of a fast target")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", default="", help="targets whose name holds this word")
    parser.add_argument("--seconds", type=float, default=1e9, help="most time for one target")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_bf16_folder(folder / "model")
        targets = [*TARGETS, *make_model_targets(model), *make_text_targets(model)]
        found = [
            run_target(target, folder, arguments.first, arguments.inputs, arguments.seconds)
            for target in targets
            if arguments.only in target.name
        ]
        if arguments.only in "C++":
            found.append(fuzz_kernels(folder / "cpp", arguments.first, 5 * arguments.inputs))
    print("total", f"{sum(inputs for inputs, _ in found):,}")
    return 1 if any(findings for _, findings in found) else 0


def run_target(target, folder: Path, first: int, inputs: int, seconds: float) -> tuple[int, int]:
    """Run one target, print its row of the table, and return its numbers of inputs and of findings."""
    own = folder / target.name.replace(" ", "_")
    own.mkdir()
    counts: Counter[str] = Counter()
    begun, slowest = time.monotonic(), 0.0
    for number in range(first, first + inputs):
        before = time.monotonic()
        try:
            counts[target.try_input(number, own)] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            counts["findings"] += 1
            print(f"finding: {target.name}, input {number}", traceback.format_exc()[-1500:], flush=True)
        slowest = max(slowest, time.monotonic() - before)
        if counts["findings"] >= MOST_FINDINGS or before - begun > seconds:
            break
    total = counts.total()
    print(
        f"| {target.name} | {total:,} | {counts['read']:,} | {counts['refused']:,} | {counts['findings']} | "
        f"{slowest:.2f} |", flush=True,
    )  # fmt: skip
    return total, counts["findings"]


if __name__ == "__main__":
    sys.exit(main())
