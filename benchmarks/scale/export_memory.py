"""Peak memory of the exports of a run, from its DCP checkpoint and from the folders that are made of it.

    python -m benchmarks.scale.export_memory [--flavor S] [--layers 2] [--ranks 8]

Measured: random weights of a published width and vocabulary with few layers, in a checkpoint whose entries are the
parts of so many ranks. A process of its own makes each export. Its anonymous memory, without mapped files, is sampled
every 5 ms; printed is the peak above what was there when the checkpoint had been opened, and that of all its resident
memory, mapped files included, which the kernel records.

Computed: an export holds one tensor at a time, so its peak does not grow with the number of layers, and the file does.
The last column is the measured peak beside the file of all layers of the flavor.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from core.checksums import CHECKSUMS
from eval.export.formats import FORMATS, ExportOptions
from eval.export.sizes import bf16_bytes, int4_bytes
from eval.export.source import Source, open_folder, open_run_checkpoint
from titan_ext.config import FLAVORS, ModelDims
from titan_ext.mobilemoe import model_config
from titan_ext.quantization.config import QuantizationConfig

CASES = (
    ("checkpoint", "bf16"), ("checkpoint", "int4"), ("bf16", "hf-native"), ("int4", "bf16"),
    ("int4", "compressed-tensors"), ("int4", "mlx"), ("int4", "gguf"),
)  # fmt: skip
"""What an export is made from, and its format."""
SAMPLE_SECONDS = 0.005


def divide(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """Mark a tensor as one that DCP saves in `ranks` parts of its first axis (`CheckpointableTensor`)."""
    marked: Any = tensor
    sizes = [tuple(part.shape) for part in tensor.chunk(ranks)]
    starts = [0, *itertools.accumulate(size[0] for size in sizes)][:-1]
    marked.global_shape, marked.local_sizes = tuple(tensor.shape), tuple(sizes)
    marked.global_offsets = marked.local_offsets = tuple((start, *[0] * (tensor.dim() - 1)) for start in starts)
    return tensor


def write_checkpoint(dims: ModelDims, ranks: int, folder: Path) -> None:
    """Save random weights as the checkpoint of a run of `ranks` has them."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model_config(dims).build().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {name: divide(torch.randn(shape, generator=generator) * 0.02, ranks) for name, shape in shapes.items()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


def open_source(name: str, dims: ModelDims, root: Path) -> Source:
    """Open the checkpoint, or a folder that an earlier case has written."""
    if name != "checkpoint":
        return open_folder(root / f"checkpoint-{name}")
    return open_run_checkpoint(root / name, dims, root / "tokenizer", QuantizationConfig(), "bfloat16")


def export_case(source_name: str, form: str, dims: ModelDims, root: Path) -> None:
    """Export in this process; print the peaks of its anonymous and of all its memory above the start, in bytes."""
    source = open_source(source_name, dims, root)
    torch.ones(1 << 20).to(torch.bfloat16)  # what the first computation loads
    start, start_all = read_bytes("RssAnon"), read_bytes("VmRSS")
    peak, stop = [start], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], read_bytes("RssAnon"))
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=sample)
    thread.start()
    FORMATS[form].write(source, root / f"{source_name}-{form}", ExportOptions())
    stop.set()
    thread.join()
    print(peak[0] - start, read_bytes("VmHWM") - start_all)


def read_bytes(field: str) -> int:
    """Return a field of this process's status, bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) * 1024


def measure_file(folder: Path) -> int:
    """Return the bytes of the weights' files of a folder."""
    return sum(path.stat().st_size for pattern in ("*.safetensors", "*.gguf") for path in folder.glob(pattern))


def main() -> None:
    """Print one row for each export, or make one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", choices=FLAVORS, default="S")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    whole = FLAVORS[arguments.flavor]
    dims = replace(whole, n_layers=arguments.layers)
    if arguments.case:
        source, form = arguments.case
        export_case(source, form, dims, arguments.root)
        return
    from tests.eval.tiny_checkpoint import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tokenizer(root / "tokenizer")
        write_checkpoint(dims, arguments.ranks, root / "checkpoint")
        print("| export | file, MB | own memory, MB | with mapped files, MB | own memory / file of all layers |")
        print("|---|--:|--:|--:|--:|")
        for source, form in CASES:
            command = [sys.executable, "-m", "benchmarks.scale.export_memory", "--flavor", arguments.flavor]
            command += ["--layers", str(arguments.layers), "--root", folder, "--case", source, form]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr[-2000:]
            own, resident = (int(word) for word in ended.stdout.split()[-2:])
            out = root / f"{source}-{form}"
            assert (out / CHECKSUMS).is_file()
            file = measure_file(out)
            predict = bf16_bytes if form in ("bf16", "hf-native") else int4_bytes
            row = (f"{source} to {form}", *(f"{size / 1e6:,.0f}" for size in (file, own, resident)))
            print(f"| {' | '.join(row)} | {own / predict(whole):.2f} |", flush=True)


if __name__ == "__main__":
    main()
