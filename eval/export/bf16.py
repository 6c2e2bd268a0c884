"""The bf16 format: an unquantized Hugging Face folder, of any checkpoint."""

from collections.abc import Iterable
from pathlib import Path

import torch

from eval.config import ExportConfig
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import with_layout
from eval.export.hf_folder import cast_tensors, fill_folder
from eval.export.source import Source
from eval.export.stored_scales import StoredScales, collect_scales, write_stored_scales
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig


def export_bf16(
    source: Source,
    out: Path,
    *,
    max_shard_bytes: int = ExportConfig.max_shard_bytes,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write the unquantized folder of a checkpoint and return `out`.

    Weights that are or were INT4 get their scales beside them (`stored_scales`), so that the INT4 export of the folder
    is bit for bit the checkpoint that they came from.

    Args:
        dtype: bfloat16, or float32, which holds q * scale exactly.

    Raises:
        RefusedInput: as `write_hf_folder`.
    """
    config, tensors, scales = read_floats(source, dtype)
    with new_folder(out) as partial:
        fill_folder(tensors, config, source.tokenizer, partial, max_shard_bytes)
        if scales is not None:
            write_stored_scales(scales, partial)
    return out


def read_floats(
    source: Source, dtype: torch.dtype
) -> tuple[MobileMoEConfig, Iterable[tuple[str, torch.Tensor]], StoredScales | None]:
    """Return an unquantized checkpoint's config, its tensors, each read when it is taken, and the grid they are on.

    Args:
        dtype: bfloat16 or float32 of all tensors but the router's weight and the expert bias, which are float32.

    Raises:
        RefusedInput: another dtype.
    """
    config, scales = with_layout(source.config, None), source.stored
    tensors: Iterable[tuple[str, torch.Tensor]] = source.tensors.items()
    if source.is_int4:
        tensors = dequantize_tensors(source.tensors, source.config, dtype)
        scales = collect_scales(source.tensors, source.config)
    return config, cast_tensors(tensors, config, dtype), scales
