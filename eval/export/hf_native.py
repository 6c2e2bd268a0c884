"""The hf-native format: a Hugging Face folder that transformers opens with its own code, as `glm4_moe`."""

from pathlib import Path

import torch
import transformers

from core.atomic import write_json
from eval.export.artifact_folder import new_folder
from eval.export.bf16 import read_floats
from eval.export.dimensions import dims_from_config
from eval.export.glm4_moe import build_native_config, convert_tensors, describe_native
from eval.export.hf_folder import write_tokenizer
from eval.export.model_card import STOCK_CODE, write_model_card
from eval.export.shards import write_shards
from eval.export.source import Source
from eval.export.stored_scales import write_stored_scales

MAX_SHARD_BYTES = 5_000_000_000
"""Size limit of one safetensors file, bytes: the hub's own tools split there."""


def export_native(
    source: Source, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the `glm4_moe` folder of a checkpoint and return `out`.

    At most one tensor of the checkpoint and those made of it are in memory. INT4 weights become floats, with their
    scales beside them as in the bf16 format.

    Args:
        dtype: bfloat16 or float32 of all tensors but the router's weight and the expert bias, which stay float32.

    Raises:
        RefusedInput: `glm4_moe` has no such model, and as `write_hf_folder`.
    """
    floats = read_floats(source, dtype)
    config = floats.config
    build_native_config(config)  # refuses what the class cannot express before anything is written
    with new_folder(out, source.tokenizer) as partial:
        write_tokenizer(source.tokenizer, config, partial)
        values = build_native_config(config) | {"transformers_version": transformers.__version__}
        write_json(partial / "config.json", values)
        form = "bf16 checkpoint for transformers' own glm4_moe"
        write_model_card(partial, dims_from_config(config), form, STOCK_CODE)
        layout = describe_native(config, floats.names)
        write_shards(convert_tensors(floats.tensors, config), layout, partial, max_shard_bytes)
        if floats.scales is not None:
            write_stored_scales(floats.scales, partial)
    return out
