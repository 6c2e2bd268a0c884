"""Size and held-out loss of a model whose experts are rounded to INT4 in groups of 32, 64 and 128.

    python benchmarks/expert_groups.py RUN/artifacts/bf16 RUN/data/heldout [--max-tokens 200000]

Rounds the weights after training (linears and embedding in groups of 32 throughout); a group that does not divide the
experts' widths is left out. Prints JSON: nats a token over text and over conversations, MB of the experts in the .pte.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from eval.export.dimensions import dims_from_config
from eval.export.hf import TensorFiles, read_config, write_hf_folder
from eval.export.int4 import quantize_int4
from eval.export.moe_blob import blob_bytes
from eval.heldout import heldout_loss
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_int4, packed_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig, quantization_of


def rounded(folder: Path, config: MobileMoEConfig, expert_group: int | None) -> dict[str, torch.Tensor]:
    """The folder's tensors in float32, on the INT4 grid unless `expert_group` is None."""
    packed, tensors = packed_tensors(config, quantization_of(32, "in")), {}
    for name, tensor in TensorFiles(folder).items():
        tensors[name] = tensor.float()
        if expert_group and name in packed:
            group, dim = (expert_group if ".experts." in name else 32), packed[name].dim
            tensors[name] = dequantize_int4(*quantize_int4(tensor, dim, group), dim, group)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--max-tokens", type=int, default=200_000)
    arguments = parser.parse_args()
    config = read_config(arguments.folder)
    d, f = config.hidden_size, config.intermediate_size
    result = {}
    for group in (None, 32, 64, 128):
        if group and (d % group or f % group):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            tensors = rounded(arguments.folder, config, group)
            dims, out = dims_from_config(config), Path(scratch) / "rounded"
            write_hf_folder(tensors, dims, arguments.folder, out, dtype=torch.float32)
            loss = {
                shards: heldout_loss(
                    out, arguments.heldout / shards, max_tokens=arguments.max_tokens, batch_size=16,
                    context=config.max_position_embeddings, report=lambda phase, done, total: None,
                )["loss"]
                for shards in ("pretrain", "sft")
            }  # fmt: skip
        n_experts = config.num_local_experts * config.num_hidden_layers
        size = group and n_experts * (blob_bytes(2 * f, d, group) + blob_bytes(d, f, group)) / 1e6
        result[f"groups of {group}" if group else "unrounded"] = {"nats": loss, "experts_mb": size}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
