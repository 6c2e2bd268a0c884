"""Our ExecuTorch program with the fused op beside llama.cpp with the same INT4 groups as Q4_0, on this machine.

    make runtimes
    python -m benchmarks.beside_llama_cpp [--layers 2] [--vocabulary 12832] [--rounds 5]

Random weights of S's width. A round measures both programs, a process each, with one and two threads, after prompts of
128 and of 4,096 tokens; printed are medians over the rounds, in tokens a second, and ratios of the two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.export_formats import ROOT, write_checkpoint
from eval.config import DeviceConfig
from eval.export.formats import FORMATS, ExportOptions
from eval.export.source import open_folder
from titan_ext.config import FLAVORS, ModelDims

POSITIONS = (128, 4096)
THREADS = (1, 2)
N_ANSWER = 64


def export_programs(dims: ModelDims, root: Path) -> dict[str, Path]:
    """Write both programs and return name -> what its worker loads."""
    folder = write_checkpoint(dims, root)
    FORMATS["int4"].write(open_folder(folder), root / "int4", ExportOptions())
    device = DeviceConfig(context=max(POSITIONS) + N_ANSWER, expert_op="fast")
    for name in ("gguf", "executorch"):
        FORMATS[name].write(open_folder(root / "int4"), root / name, replace(ExportOptions(), device=device))
    return {"ours": root / "executorch", "llama.cpp": root / "gguf/model-q4_0.gguf"}


def measure(program: str, artifact: Path, tokens: list[int], threads: int) -> dict[str, float]:
    """Return tokens a second of prefill and decode in a process of its own."""
    spec = {"artifact": str(artifact), "tokens": tokens, "n_answer": N_ANSWER, "threads": threads, "repetitions": 3}
    command = [sys.executable, "-m", "eval.device.profile_worker"]
    environment = dict(os.environ)
    if program == "llama.cpp":
        command = [sys.executable, str(ROOT / "benchmarks/compute_in_llama_cpp.py")]
        environment["PYTHONPATH"] = str(ROOT / ".runtimes/llama_cpp")
    done = subprocess.run(command, input=json.dumps(spec), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "prefill": (len(tokens) - N_ANSWER) / statistics.median(found["prefill_seconds"]),
        "decode": N_ANSWER / statistics.median(found["decode_seconds"]),
    }


def main() -> None:
    """Export, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=12_832)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    dims = replace(FLAVORS["S"], n_layers=arguments.layers, vocab_size=arguments.vocabulary)
    found: dict[tuple[str, int, int, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        programs = export_programs(dims, Path(folder))
        generator = torch.Generator().manual_seed(1)
        for number in range(arguments.rounds):
            for position in POSITIONS:
                tokens = torch.randint(dims.vocab_size, (position + N_ANSWER,), generator=generator).tolist()
                for threads in THREADS:
                    for program, artifact in programs.items():
                        for kind, speed in measure(program, artifact, tokens, threads).items():
                            found.setdefault((kind, position, threads, program), []).append(speed)
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    print("| | threads | ours, tokens/s | llama.cpp Q4_0, tokens/s | ratio (of each round: least, largest) |")
    print("|---|--:|--:|--:|--:|")
    for kind in ("prefill", "decode"):
        for position in POSITIONS:
            for threads in THREADS:
                ours, theirs = (found[kind, position, threads, program] for program in programs)
                ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                what = f"{kind} of {position:,}" if kind == "prefill" else f"{kind} after {position:,}"
                print(
                    f"| {what} | {threads} | {statistics.median(ours):,.0f} | {statistics.median(theirs):,.0f} | "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) |"
                )


if __name__ == "__main__":
    main()
