"""The bf16 format: an unquantized Hugging Face folder, of any checkpoint."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.config import ExportConfig
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import with_layout
from eval.export.hf_folder import cast_tensors, fill_folder
from eval.export.source import Source
from eval.export.stored_scales import StoredScales, collect_scales, write_stored_scales
from eval.export.tensor_layout import describe_folder
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_tensors, tensor_shapes
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
    floats = read_floats(source, dtype)
    with new_folder(out, source.tokenizer) as partial:
        layout = describe_folder(floats.config, floats.names)
        fill_folder(floats.tensors, layout, floats.config, source.tokenizer, partial, max_shard_bytes)
        if floats.scales is not None:
            write_stored_scales(floats.scales, partial)
    return out


@dataclass(frozen=True)
class Floats:
    """The unquantized form of a checkpoint."""

    config: MobileMoEConfig
    names: Sequence[str]
    """Names of the tensors in the order in which they come."""
    tensors: Iterator[tuple[str, torch.Tensor]]
    """Names and values; each tensor is read when it is taken."""
    scales: StoredScales | None
    """INT4 grid that the values lie on, if there is one."""


def read_floats(source: Source, dtype: torch.dtype) -> Floats:
    """Return a checkpoint as floats, dequantized if it is INT4.

    Args:
        dtype: bfloat16 or float32 of all tensors but the router's weight and the expert bias, which are float32.

    Raises:
        RefusedInput: another dtype.
    """
    config, scales = with_layout(source.config, None), source.stored
    tensors: Iterable[tuple[str, torch.Tensor]] = source.tensors.items()
    names = list(source.tensors)
    if source.is_int4:
        tensors, names = dequantize_tensors(source.tensors, source.config, dtype), list(tensor_shapes(config))
        scales = collect_scales(source.tensors, source.config)
    return Floats(config, names, cast_tensors(tensors, config, dtype), scales)
