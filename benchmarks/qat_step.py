"""Processor time of a QAT step over that of an SFT step, of the trainer: FSDP2 on one rank, four micro-batches.

    python benchmarks/qat_step.py [--rounds 7] [--vocab-size 16384] [--seq-len 256] [--beside CHECKOUT]

One layer of S width in float32, one thread. Every variant is a process of its own. They take turns, one step at a time,
and the figures are medians over the rounds; a ratio compares steps of the same round. With --beside, the same two steps
of another checkout of the repository take part, named `SFT, beside` and `QAT, beside`. Processor time is the process's
own, so that other work on the machine distorts it less than time by the clock.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARMUP_ROUNDS = 2
MICRO_BATCHES = 4


def serve(quantize: bool, vocab_size: int, seq_len: int) -> None:
    """Build a trainer in this process, and answer every line on stdin with a step's processor time in seconds."""
    import torch

    from benchmarks.gpu.one_rank import build_trainer, describe_training, make_step
    from titan_ext.config import FLAVORS

    torch.set_num_threads(1)
    dims = dataclasses.replace(FLAVORS["S"], n_layers=1, vocab_size=vocab_size)
    training = describe_training(
        dims, seq_len=seq_len, local_batch_size=1, micro_batches=MICRO_BATCHES, quantize=quantize,
        precision="float32", activation_checkpoint="none", compile=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(build_trainer(training, Path(folder) / "run"))
        for _ in sys.stdin:
            start = time.process_time()
            step()
            print(json.dumps(time.process_time() - start), flush=True)


class Variant:
    """A variant in a process of its own, which takes a step when asked to."""

    def __init__(self, checkout: Path, quantize: bool, vocab_size: int, seq_len: int):
        command = [
            sys.executable, __file__, "--serve", "qat" if quantize else "sft", "--vocab-size", str(vocab_size),
            "--seq-len", str(seq_len),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> float:
        """Return the seconds of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        while not (answer := self.process.stdout.readline()).strip().replace(".", "").replace("e-", "").isdigit():
            if not answer:
                sys.exit(f"a variant ended with {self.process.wait()}; -9 is the system out of memory")
        return float(answer)


def main() -> None:
    """Time the variants and print medians and ratios; with --serve, be the process of one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--beside", type=Path, help="another checkout of the repository")
    parser.add_argument("--serve", choices=("sft", "qat"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve == "qat", arguments.vocab_size, arguments.seq_len)
        return
    checkouts = {"": ROOT} | ({", beside": arguments.beside} if arguments.beside else {})
    variants = {
        f"{'QAT' if quantize else 'SFT'}{suffix}": Variant(folder, quantize, arguments.vocab_size, arguments.seq_len)
        for suffix, folder in checkouts.items()
        for quantize in (False, True)
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(WARMUP_ROUNDS + arguments.rounds):
        for name, variant in variants.items():
            seconds = variant.step()
            if number >= WARMUP_ROUNDS:
                times[name].append(seconds)
    pairs = [(f"QAT{suffix}", f"SFT{suffix}") for suffix in checkouts]
    if arguments.beside:
        pairs += [("SFT", "SFT, beside"), ("QAT", "QAT, beside")]
    ratios = {
        f"{one} over {other}": statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))
        for one, other in pairs
    }
    print(json.dumps({"seconds": {name: statistics.median(t) for name, t in times.items()}} | ratios, indent=2))


if __name__ == "__main__":
    main()
