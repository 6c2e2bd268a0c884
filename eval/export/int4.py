"""INT4 checkpoints, layout `mobilemoe-int4-g32`: symmetric, group-wise, two values a byte (arXiv 2605.27358, QAT).

A group of values w along one axis shares the scale s = max|w| / 7.5, and q = clamp(round(w * (1 / s)), -8, 7). s is
rounded to a number that both bfloat16 (what the device's kernels read) and float16 (what the file stores) hold exactly.
The weight a reader sees is q * s.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from core.errors import RefusedInput
from eval.config import ExportConfig
from eval.export.dimensions import config_from_dims
from eval.export.hf import new_folder, open_tensors, read_config, write_folder
from eval.hf_mobilemoe.checkpoint_mobilemoe import (
    check_tensors,
    dequantize_int4,
    dequantize_tensors,
    kept_in_float32,
    packed_tensors,
)
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig, describe_quantization
from titan_ext.config import ModelDims

SCALES_FILE = "int4/scales.safetensors"
"""In a dequantized folder: the scales it came from. In a subfolder, so that readers of *.safetensors do not meet it."""

_SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16; the scale of a group that is all zero or too small for a larger one."""


def int4_scale(weight: torch.Tensor, dim: int, group_size: int) -> torch.Tensor:
    """float16 scales of groups of `group_size` values along `dim` (>= 0), `dim` divided by it.

    max|w| / 7.5 in float32, rounded to bfloat16 and then to float16: below 2^-17 float16 is the coarser of the two, and
    its values there are bfloat16 values as well. At least 2^-24.
    """
    groups = weight.float().unflatten(dim, (-1, group_size))
    scale = (groups.abs().amax(dim=dim + 1) / 7.5).to(torch.bfloat16).to(torch.float16)
    if not scale.isfinite().all():
        raise RefusedInput(
            f"a weight of {weight.abs().max().item():g} needs a scale beyond float16 (at most 65504 * 7.5)"
        )
    return scale.clamp(min=_SMALLEST_SCALE)


def quantize_int4(
    weight: torch.Tensor, dim: int, group_size: int, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values in -8..7 of `weight`'s shape and their float16 scales (`int4_scale` unless given)."""
    scale = int4_scale(weight, dim, group_size) if scale is None else scale
    groups = weight.float().unflatten(dim, (-1, group_size))
    # The reciprocal, as torchao and the device's packer: a division rounds +-7.5 differently.
    # A released group of zeros may have a scale of zero.
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    q = (groups * inverse.unsqueeze(dim + 1)).round().clamp(-8, 7)
    return q.flatten(dim, dim + 1).to(torch.int8), scale


def pack_int4(q: torch.Tensor, dim: int) -> torch.Tensor:
    """int8 values in -8..7 -> uint8 with two of them a byte along `dim` (>= 0, of even size), the low nibble first."""
    low, high = q.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return ((low & 0xF) | ((high & 0xF) << 4)).to(torch.uint8)


def quantize_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: MobileMoEConfig,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Turn an unquantized checkpoint's tensors into those of the INT4 checkpoint `config.quantization` describes.

    Router float32, norms and expert bias bfloat16, everything else packed. With `scales` (float16, by the names of the
    INT4 checkpoint) no scale is derived; the weights must then lie on the grid of these scales.

    Raises:
        RefusedInput: the group size does not divide a dimension, a scale overflows, or a weight is off the grid.
    """
    packed = packed_tensors(config, config.quantization)
    for name, tensor in tensors:
        if name not in packed:
            yield name, tensor.to(torch.float32 if name.endswith("router.weight") else torch.bfloat16)
            continue
        p = packed[name]
        try:
            q, scale = quantize_int4(tensor, p.dim, p.group_size, None if scales is None else scales[p.scale_name])
        except ValueError as error:
            raise RefusedInput(f"{name}: {error}") from error
        if scales is not None and not dequantize_int4(q, scale, p.dim, p.group_size).to(tensor.dtype).equal(tensor):
            raise RefusedInput(f"{name} does not lie on the stored scales; remove {SCALES_FILE} to quantize it afresh")
        yield p.qweight_name, pack_int4(q, p.dim)
        yield p.scale_name, scale


def quantize_state_dict(
    tensors: Mapping[str, torch.Tensor], config: MobileMoEConfig, group_size: int = 32, expert_group_axis: str = "in"
) -> dict[str, torch.Tensor]:
    """`quantize_tensors` over a whole state dict; `expert_group_axis` is "in" or "out"."""
    check_tensors({n: tuple(t.shape) for n, t in tensors.items()}, with_quantization(config, None), "the state dict")
    config = with_quantization(config, describe_quantization(group_size, expert_group_axis))
    return dict(quantize_tensors(tensors.items(), config))


def layout_of(export: ExportConfig) -> dict[str, Any]:
    """config.json's `quantization` of what `export` asks for."""
    return describe_quantization(export.group_size, export.expert_group_axis, export.expert_group_size)


def with_quantization(config: MobileMoEConfig, quantization: dict | None) -> MobileMoEConfig:
    """A copy of `config` that describes a checkpoint quantized so (None: not quantized)."""
    return MobileMoEConfig.from_dict(config.to_dict() | {"quantization": quantization})


def write_int4_folder(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    dims: ModelDims,
    tokenizer_dir: Path,
    out: Path,
    export: ExportConfig,
    *,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Write the INT4 folder of unquantized tensors; arguments and errors as `write_hf_folder`.

    Give the weights as quantization-aware training's forward saw them: rounding float32 weights to bfloat16 first moves
    some of them, and some scales, to the neighbouring value.
    """
    quantization = layout_of(export)
    config = config_from_dims(dims, **(extra_config or {}) | {"quantization": quantization})
    config.dtype = torch.bfloat16
    packed_tensors(config, quantization)  # refuses a group size that does not fit before anything is written
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    with new_folder(out) as partial:
        write_folder(quantize_tensors(items, config), config, tokenizer_dir, partial, export.max_shard_bytes)
    return out


def quantize_folder(source: Path, out: Path, export: ExportConfig | None = None) -> Path:
    """Write the INT4 folder of an unquantized one (of any float dtype) or of an imported checkpoint.

    Where `source` came from INT4 (`dequantize_folder`, or imported) with the same layout, the scales stored there are
    used, and the result is bit for bit the INT4 folder it came from. Otherwise every scale is max|w| / 7.5 of the
    weights found.

    Args:
        export: the layout; the one of the stored scales, or the default, if not given.

    Raises:
        RefusedInput: `source` is no complete unquantized checkpoint, or cannot be quantized in this layout.
    """
    config = read_config(source)
    if config.quantization is not None:
        raise RefusedInput(f"{source} is quantized already ({config.quantization['format']}); copy it as it is")
    layout = stored_layout(source) if export is None else None
    export = export or ExportConfig()
    quantized = with_quantization(config, layout or layout_of(export))
    packed_tensors(quantized, quantized.quantization)  # refuses a group size that does not fit before all else
    tensors = open_tensors(source, config)
    scales = stored_scales(source, quantized)
    with new_folder(out) as partial:
        stream = quantize_tensors(tensors.items(), quantized, scales)
        write_folder(stream, quantized, source, partial, export.max_shard_bytes)
    return out


def dequantize_folder(
    source: Path, out: Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = ExportConfig.max_shard_bytes
) -> Path:
    """Write the unquantized folder of an INT4 one, its scales beside it (`SCALES_FILE`) for the way back.

    float32 holds q * scale exactly; bfloat16 rounds it once, by at most 2^-8 of its size and so by at most 1/32 of a
    quantization step: the stored scales recover every q. Without them q * scale has max|q| 7 or 8 in a group
    and not 7.5: re-deriving the scales would give others.

    Raises:
        RefusedInput: `source` is not a complete INT4 checkpoint.
    """
    config = read_config(source)
    if config.quantization is None:
        raise RefusedInput(f"{source} is not quantized; there is nothing to dequantize")
    packed = open_tensors(source, config)
    plain = with_quantization(config, None)
    plain.dtype = dtype
    with new_folder(out) as partial:
        write_folder(dequantize_tensors(packed, config, dtype), plain, source, partial, max_shard_bytes)
        store_scales(packed, config, partial)
    return out


def bf16_folder(source: Path, out: Path) -> Path:
    """Write the bfloat16 folder of any Hugging Face folder or imported checkpoint, stored scales included.

    Raises:
        RefusedInput: `source` is no complete checkpoint.
    """
    config = read_config(source)
    if config.quantization is not None:
        return dequantize_folder(source, out)
    config.dtype = torch.bfloat16
    tensors = open_tensors(source, config)
    cast = ((n, t.to(torch.float32 if kept_in_float32(n) else torch.bfloat16)) for n, t in tensors.items())
    with new_folder(out) as partial:
        write_folder(cast, config, source, partial, ExportConfig.max_shard_bytes)
        if (Path(source) / SCALES_FILE).is_file():
            (partial / SCALES_FILE).parent.mkdir()
            shutil.copyfile(Path(source) / SCALES_FILE, partial / SCALES_FILE)
    return out


def store_scales(packed: Mapping[str, torch.Tensor], config: MobileMoEConfig, folder: Path) -> None:
    """Write the scales of an INT4 checkpoint into a folder that gets its weights as floats."""
    (folder / SCALES_FILE).parent.mkdir()
    layout = {"format": "pt", "quantization": json.dumps(config.quantization, sort_keys=True)}
    names = [p.scale_name for p in packed_tensors(config, config.quantization).values()]
    save_file({name: packed[name] for name in names}, folder / SCALES_FILE, metadata=layout)


def stored_layout(folder: Path) -> dict[str, Any] | None:
    """The `quantization` that a folder with stored scales came from, None where there are none."""
    path = Path(folder) / SCALES_FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["quantization"])


def stored_scales(folder: Path, config: MobileMoEConfig) -> dict[str, torch.Tensor] | None:
    """Scales beside a dequantized folder, None where there are none or where they are of another layout."""
    if config.quantization is None or stored_layout(folder) != config.quantization:
        return None
    return load_file(Path(folder) / SCALES_FILE)
