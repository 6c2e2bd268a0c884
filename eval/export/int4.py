"""The int4 format: layout `mobilemoe-int4-g32`, symmetric, group-wise, two values a byte (arXiv 2605.27358, QAT).

The arithmetic is that of `titan_ext.quantization.formulas`; the weight a reader sees is q * scale. Unpacking and
dequantization lie in `eval.hf_mobilemoe.checkpoint_mobilemoe`, which ships with the artifacts.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from core.errors import RefusedInput, refuse_value_errors
from eval.config import ExportConfig
from eval.export.artifact_folder import new_folder
from eval.export.chunks import map_chunks
from eval.export.dimensions import int4_layout, with_layout
from eval.export.hf_folder import fill_folder
from eval.export.source import Source
from eval.export.stored_scales import SCALES_FILE
from eval.export.tensor_layout import choose_dtype_beside_int4, describe_folder
from eval.hf_mobilemoe.checkpoint_mobilemoe import PackedTensor, dequantize_int4, packed_tensors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import LARGEST_INT4_SCALE, int4_scale, quantize_int4


def export_int4(source: Source, out: Path, *, max_shard_bytes: int = ExportConfig.max_shard_bytes) -> Path:
    """Write the INT4 folder of an unquantized checkpoint and return `out`.

    A QAT stage's checkpoint becomes exactly the weights that its forward pass used. Weights that came from INT4 with
    the same layout keep the scales stored with them, and the result is bit for bit the checkpoint they came from.
    Otherwise every scale is max|w| / 7.5 of the weights found.

    Raises:
        RefusedInput: the checkpoint is INT4 already, or cannot be quantized in this layout; and as `write_hf_folder`.
    """
    if source.config.quantization is not None:
        raise RefusedInput(
            f"{source.tokenizer} is quantized already ({source.config.quantization['format']}); copy it as it is"
        )
    layout = source.layout or (source.stored and source.stored.layout) or int4_layout(QuantizationConfig())
    config = with_layout(source.config, layout)
    find_packed_tensors(config)  # refuses a group size that does not fit before anything is written
    stream = quantize_tensors(source.tensors.items(), config, source.scales_for(layout))
    with new_folder(out, source.tokenizer) as folder:
        layout = describe_folder(config, source.tensors)
        fill_folder(stream, layout, config, source.tokenizer, folder, max_shard_bytes)
    return out


def quantize_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    config: MobileMoEConfig,
    scales: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the INT4 checkpoint that `config.quantization` describes, made of an unquantized one's.

    Args:
        scales: float16, by the names of the INT4 checkpoint; the weights must lie on their grid. None derives them.

    Raises:
        RefusedInput: as `quantize_tensor`.
    """
    packed = find_packed_tensors(config)
    for name, tensor in tensors:
        if name not in packed:
            yield name, cast_unquantized(name, tensor)
            continue
        q, scale = quantize_tensor(tensor, packed[name], scales)
        del tensor  # here and below: before the next one is read
        qweight = map_chunks(partial(pack_int4, dim=packed[name].dim), q)
        del q
        yield packed[name].qweight_name, qweight
        yield packed[name].scale_name, scale
        del qweight, scale


def quantize_tensor(
    weight: torch.Tensor, packed: PackedTensor, scales: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values in -8..7 of the weight's shape, and the float16 scales of its groups.

    Args:
        packed: which axis of the weight is grouped, and its names.
        scales: as `quantize_tensors`.

    Raises:
        RefusedInput: a scale overflows float16, or a weight is off the grid of `scales`.
    """
    dim, group_size = packed.dim, packed.group_size

    def quantize(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        q = quantize_int4(part, scale, dim, group_size)
        if scales is not None and not _is_on_grid(part, dequantize_int4(q, scale, dim, group_size)):
            raise RefusedInput(
                f"{packed.name} does not lie on the stored scales; remove {SCALES_FILE} to quantize it afresh"
            )
        return q

    if scales is None:
        scale = map_chunks(lambda part: derive_scale(part, dim, group_size, packed.name), weight)
    else:
        scale = scales[packed.scale_name]
    return map_chunks(quantize, weight, scale), scale


def _is_on_grid(weight: torch.Tensor, exact: torch.Tensor) -> bool:
    """Return whether a weight is q * scale, or its rounding to bfloat16, in which a bf16 folder passes it on."""
    return exact.to(weight.dtype).equal(weight) or exact.bfloat16().to(weight.dtype).equal(weight)


def derive_scale(weight: torch.Tensor, dim: int, group_size: int, name: str = "weight") -> torch.Tensor:
    """Return `int4_scale` as float16, in which an INT4 file stores it without rounding it again.

    Raises:
        RefusedInput: a scale is beyond float16, or a weight is not finite.
    """
    scale = int4_scale(weight, dim, group_size)
    if scale.max() > LARGEST_INT4_SCALE or not weight.isfinite().all():
        raise RefusedInput(
            f"{name}: a weight of {weight.abs().max().item():g} needs a scale beyond float16 (at most 65504 * 7.5)"
        )
    return scale.to(torch.float16)


def cast_unquantized(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that stays unpacked as an INT4 file stores it."""
    return tensor.to(choose_dtype_beside_int4(name))


def pack_int4(q: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the low four bits of int8 values as uint8, two a byte along `dim` (>= 0, of even size), the first low."""
    low, high = q.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return ((low & 0xF) | ((high & 0xF) << 4)).to(torch.uint8)


def find_packed_tensors(config: MobileMoEConfig) -> dict[str, PackedTensor]:
    """Return the weights that an INT4 file of `config.quantization` holds packed, by their unquantized names.

    Raises:
        RefusedInput: the group size does not divide a dimension.
    """
    with refuse_value_errors():
        return packed_tensors(config, config.quantization)
