"""How much a quick suite of benchmarks slows the steps that it runs beside.

    python -m benchmarks.quick_suite FOLDER [--rounds 2] [--steps 120]

The recipe smoke is trained by one worker with one thread, with `benchmark_interval` 0 and with scores every 20 steps,
in turn, on the same data in FOLDER. The suite has one CPU of its own, so two cores are needed. Printed: the median
seconds of the steps between the first and the last score, and the same steps without scores.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

INTERVAL = 20
MODES = {"without": 0, "with scores": INTERVAL}
OPTIONS = (
    "--parallel.world-size", "1", "--parallel.expert-parallel", "1", "--cluster.cpus-per-worker", "1",
    "--cluster.cpus-per-task", "1", "--evaluation.quick-limit", "40", "--stages.pretrain.log-interval", "1",
    "--stages.pretrain.warmup-steps", "10", "--stages.pretrain.checkpoint-interval", str(INTERVAL),
    "--stages.pretrain.checkpoints-kept", "10", "--stages.pretrain.heldout-interval", "100000",
)  # fmt: skip


def run(out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "run", "smoke", "--out", str(out), *OPTIONS, *options]
    with (out.parent / f"{out.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def read_seconds(out: Path) -> dict[int, float]:
    """Return step -> seconds."""
    lines = (out / "stages/1_pretrain/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    tokens = records[1]["tokens"] - records[0]["tokens"]
    return {record["step"]: tokens / record["tokens_per_second"] for record in records}


def main() -> None:
    """Prepare the data, then train in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = arguments.folder / "data"
    run(data, "--until", "data")
    print("| round | scores | without, s a step | with scores, s a step | ratio |\n|--:|--:|--:|--:|--:|")
    for number in range(arguments.rounds):
        found, scored = {}, 0
        for mode, interval in MODES.items():
            out = arguments.folder / f"round-{number}-{interval}"
            shutil.copytree(data, out, dirs_exist_ok=True)
            steps = ("--stages.pretrain.steps", str(arguments.steps))
            run(out, "--until", "pretrain", *steps, "--stages.pretrain.benchmark-interval", str(interval))
            found[mode] = read_seconds(out)
            results = out / "stages/1_pretrain/benchmarks.jsonl"
            scored = len(results.read_text().splitlines()) if results.exists() else 0
            shutil.rmtree(out)
        # From the first checkpoint on, the suite is at work.
        medians = [
            statistics.median(seconds for step, seconds in found[mode].items() if step > INTERVAL) for mode in MODES
        ]
        print(
            f"| {number} | {scored} | {medians[0]:.3f} | {medians[1]:.3f} | {medians[1] / medians[0]:.3f} |", flush=True
        )


if __name__ == "__main__":
    main()
