"""This program counts the instructions that a token of flavor S takes with each tile kernel, on processors of qemu.

    apt-get install --no-install-recommends qemu-user g++-aarch64-linux-gnu g++
    python -m benchmarks.instruction_counts [--prompt 64] [--kernels neon_dot avx2]

It runs the phone's benchmark with S's width on one thread, under a plugin that counts by function
(benchmarks/count_instructions.c). Three reduced models give the count of a layer and of 1,024 rows of the vocabulary,
and these the count of S: it is linear in both. A decoded token is the difference between answers of two tokens and of
one, at position 2; a token of a prompt is the mean over a prompt, without its first token. Counts are no times.
Prints a table. qemu does not emulate AVX-512.
"""

import argparse
import collections
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.export_formats import write_checkpoint
from eval.device import phone_bench
from eval.device.compiler import compile_file
from eval.export.source import open_folder
from titan_ext.config import FLAVORS

PLUGIN = Path(__file__).with_name("count_instructions.c")
KERNELS = {
    "neon_i8mm": ("qemu-aarch64", "max"), "neon_dot": ("qemu-aarch64", "cortex-a76"),
    "portable, aarch64": ("qemu-aarch64", "cortex-a53"), "avx2": ("qemu-x86_64", "max"),
    "portable, x86-64": ("qemu-x86_64", "max"),
}  # fmt: skip
FAMILIES = {"tiles": ("block_", "tile_"), "rounding": ("quantize_row",), "attention": ("attend", "add_attention")}
"""Part of a token's work -> parts of its functions' names; the rest is router, SwiGLU, norms, sums and memory."""
VOCABULARY = 1024


def count(program: Path, kernel: str, model: Path, plugin: Path, prompt: int, answer: int) -> collections.Counter:
    """Return the instructions by family; the program computes everything twice."""
    emulator, processor = KERNELS[kernel]
    with tempfile.NamedTemporaryFile() as out:
        command = [emulator, "-cpu", processor, "-plugin", f"{plugin},out={out.name}", str(program), str(model)]
        command += ["--kernel", kernel.split(",")[0], "--prompt", str(prompt), "--answer", str(answer)]
        subprocess.run([*command, "--repetitions", "1"], check=True, capture_output=True)
        lines = Path(out.name).read_text().splitlines()
    found: collections.Counter = collections.Counter()
    for line in lines:
        number, function = line.split(" ", 1)
        family = next((family for family, parts in FAMILIES.items() if any(p in function for p in parts)), "rest")
        found[family] += int(number)
    return found


def combine(*terms: tuple[float, collections.Counter]) -> dict[str, float]:
    """Return a sum of multiples of counts."""
    return {family: sum(n * counts[family] for n, counts in terms) for family in (*FAMILIES, "rest")}


def main() -> None:
    """Build, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    options = parser.parse_args()
    prompt = options.prompt
    s = FLAVORS["S"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plugin = root / "count.so"
        compile_file("gcc", ["-O2", "-shared", "-fPIC", str(PLUGIN)], plugin, what="the plugin", advice="install gcc")
        for name, compiler in (("qemu-aarch64", phone_bench.ARM_COMPILER), ("qemu-x86_64", "g++")):
            phone_bench.build(root / name, compiler)
        models = {}
        for n_layers, n_blocks in ((1, 1), (2, 1), (1, 2)):
            dims = replace(s, n_layers=n_layers, vocab_size=n_blocks * VOCABULARY)
            checkpoint = write_checkpoint(dims, root / f"{n_layers}-{n_blocks}")
            models[n_layers, n_blocks] = root / f"{n_layers}-{n_blocks}.model"
            phone_bench.write_model(open_folder(checkpoint), models[n_layers, n_blocks])
        print("| kernel | token | tiles | rounding | attention | rest | together, millions |")
        print("|---|---|--:|--:|--:|--:|--:|")
        for kernel in options.kernels:
            program = root / KERNELS[kernel][0] / "device_bench"
            decode, prefill = {}, {}
            for size, model in models.items():
                one, two, long = (count(program, kernel, model, plugin, *n) for n in ((1, 1), (1, 2), (prompt, 1)))
                decode[size] = collections.Counter({family: (two[family] - one[family]) / 2 for family in two})
                per_token = 2 * (prompt - 1)
                prefill[size] = collections.Counter({f: (long[f] - one[f]) / per_token for f in long})
            for name, counts in (("decoded", decode), (f"of a prompt of {prompt}", prefill)):
                base, deeper, wider = counts[1, 1], counts[2, 1], counts[1, 2]
                layers, blocks = s.n_layers - 1, s.vocab_size / VOCABULARY - 1
                total = combine((1 - layers - blocks, base), (layers, deeper), (blocks, wider))
                numbers = " | ".join(f"{n / 1e6:.1f}" for n in (*total.values(), sum(total.values())))
                print(f"| {kernel} | {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
