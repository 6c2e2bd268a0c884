"""Exports at S width: peak memory of every format, and what llama.cpp computes over 4,096 tokens.

    python -m benchmarks.export_formats [--layers 2] [--parts memory llama-cpp]

Memory: a process of its own exports a bfloat16 folder with the published vocabulary. Its anonymous memory is sampled
every 5 ms; printed is the peak above what was there when the checkpoint had been opened, beside the largest tensor of
the checkpoint.

llama.cpp (`make runtimes`): logits of random weights with a tenth of the vocabulary, the last of 4,096 tokens included,
against transformers' float32 of the same folder; against the same with rotary angles rounded as ggml rounds them; and
how many of the largest logits are the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from eval.config import GgufConfig
from eval.export.dimensions import config_from_dims
from eval.export.formats import FORMATS, ExportOptions
from eval.export.gguf_file import compute_rope_divisors
from eval.export.hf_folder import write_hf_folder
from eval.export.hf_native import export_native
from eval.export.source import open_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.config import FLAVORS, ModelDims

ROOT = Path(__file__).parents[1]
SHARD_BYTES = 256 << 20
LENGTH = 4096
SMALL_VOCABULARY = 12_832
CASES = ("int4", "hf-native", "gguf q4_0", "gguf bf16", "gguf f16", "int4 to gguf q4_0")


def make_tensors(dims: ModelDims):
    """Yield random weights of unit gain, one by one; the expert bias is small."""
    generator = torch.Generator().manual_seed(0)
    for name, shape in tensor_shapes(config_from_dims(dims)).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            yield name, 1 + 0.1 * values
        elif name.endswith("expert_bias"):
            yield name, 0.01 * values
        else:
            yield name, values * shape[1] ** -0.5


def write_checkpoint(dims: ModelDims, folder: Path) -> Path:
    """Write the bfloat16 folder of random weights."""
    from tests.eval.tiny_checkpoint import write_tokenizer

    return write_hf_folder(make_tensors(dims), dims, write_tokenizer(folder / "tokenizer"), folder / "bf16")


def export_case(case: str, root: Path, out: Path) -> None:
    """Export in this process and print the peak of its anonymous memory above the start, in bytes."""
    source = open_folder(root / ("int4" if case.startswith("int4 to") else "bf16"))
    peak, stop = [_anonymous_bytes()], threading.Event()
    start = peak[0]

    def sample() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], _anonymous_bytes())
            time.sleep(0.005)

    thread = threading.Thread(target=sample)
    thread.start()
    name, *type_name = case.removeprefix("int4 to ").split()
    if name == "hf-native":
        export_native(source, out, max_shard_bytes=SHARD_BYTES)
    else:
        options = ExportOptions(gguf=GgufConfig(*type_name))
        FORMATS[name].write(source, out, replace(options, export=replace(options.export, max_shard_bytes=SHARD_BYTES)))
    stop.set()
    thread.join()
    print(peak[0] - start)


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def measure_memory(dims: ModelDims, root: Path) -> None:
    """Print a row for every format."""
    folder = write_checkpoint(dims, root)
    largest = max(tensor.nbytes for tensor in open_folder(folder).tensors.values())
    print(f"largest tensor {largest / 1e6:.0f} MB")
    print("| format | peak above the start, MB |\n|---|--:|")
    for case in CASES:
        out = root / ("int4" if case == "int4" else f"out-{case.replace(' ', '-')}")
        command = [
            sys.executable,
            "-m",
            "benchmarks.export_formats",
            "--case",
            case,
            "--root",
            str(root),
            "--out",
            str(out),
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr[-2000:]
        print(f"| {case} | {int(ended.stdout.split()[-1]) / 1e6:.0f} |", flush=True)


def compare_llama_cpp(dims: ModelDims, root: Path) -> None:
    """Print how far llama.cpp's logits over 4,096 tokens are from ours."""
    folder = write_checkpoint(dims, root)
    FORMATS["int4"].write(open_folder(folder), root / "int4", ExportOptions())
    ids = torch.randint(dims.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    inputs = {
        "context": LENGTH + 64, "ids": [ids], "texts": [], "messages": [{"role": "user", "content": "the"}],
        "new_tokens": 0,
    }  # fmt: skip
    (root / "inputs.json").write_text(json.dumps(inputs))
    print("| file | logits, dB | at the last position, dB | with ggml's angles, dB | same largest logit |")
    print("|---|--:|--:|--:|--:|")
    for source, type_name in (("bf16", "f32"), ("int4", "f32"), ("int4", "q4_0")):
        out = root / f"{source}-{type_name}"
        FORMATS["gguf"].write(open_folder(root / source), out, ExportOptions(gguf=GgufConfig(type_name)))
        script = ROOT / "tests/runtimes/compute_in_llama_cpp.py"
        file, results = out / f"model-{type_name}.gguf", root / f"{out.name}.npz"
        command = [sys.executable, str(script), str(file), str(root / "inputs.json"), str(results)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / ".runtimes/llama_cpp")}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found = torch.tensor(np.load(results)["logits_0"])
        expected = compute_logits(root / source, ids)
        with mock.patch("eval.hf_mobilemoe.modeling_mobilemoe.rotary_embedding", rotate_as_ggml):
            ggml_angles = compute_logits(root / source, ids)
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        snr = (measure_snr(found, expected), measure_snr(found[-1], expected[-1]), measure_snr(found, ggml_angles))
        print(f"| {source} as {type_name} | {' | '.join(f'{x:.1f}' for x in snr)} | {same:.2%} |", flush=True)


def compute_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return transformers' float32 logits [L, V] of our modeling code."""
    with torch.no_grad():
        return MobileMoEForCausalLM.from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]


def measure_snr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the signal-to-noise ratio in decibels."""
    return float(10 * torch.log10(expected.pow(2).sum() / (found - expected).pow(2).sum()))


def rotate_as_ggml(config: MobileMoEConfig, positions_BL: torch.Tensor) -> torch.Tensor:
    """Return cos + i sin, complex64 [B, L, C/2], of angles that are float32 products, one frequency from the last.

    ggml multiplies the angle by base^(-2 / C) from pair to pair, and divides it by the factor of `rope_freqs`
    (`ggml_rope_cache_init`).
    """
    step = torch.tensor(config.rope_theta, dtype=torch.float32) ** torch.tensor(-2.0 / config.head_dim)
    theta, angles = positions_BL.float(), []
    for divisor in torch.from_numpy(compute_rope_divisors(config)):
        angles.append(theta / divisor)
        theta = theta * step
    angles_BLP = torch.stack(angles, dim=-1)
    return torch.polar(torch.ones_like(angles_BLP), angles_BLP)


def main() -> None:
    """Measure, or export one case in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--parts", nargs="*", default=["memory", "llama-cpp"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        export_case(arguments.case, arguments.root, arguments.out)
        return
    dims = replace(FLAVORS["S"], n_layers=arguments.layers)
    if "memory" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            measure_memory(dims, Path(folder))
    if "llama-cpp" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            compare_llama_cpp(replace(dims, vocab_size=SMALL_VOCABULARY), Path(folder))


if __name__ == "__main__":
    main()
