"""INT4 values and scales of any checkpoint, for the formats that pack them anew."""

import torch

from core.errors import RefusedInput
from eval.export.chunks import map_chunks
from eval.export.dimensions import dims_from_config, int4_layout, with_layout
from eval.export.int4 import find_packed_tensors, pack_int4, quantize_tensor
from eval.export.limits import INT4_BLOCK, explain_block_misfit
from eval.export.source import Source
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_int4, unpack_int4
from eval.hf_mobilemoe.configuration_mobilemoe import EXPERT_GROUP_AXES
from titan_ext.quantization.config import QuantizationConfig


class PackedWeights:
    """The INT4 weights of a checkpoint: those that it holds, or those that the int4 format would write of it."""

    def __init__(self, source: Source):
        """Choose the layout as `int4.export_int4` does.

        Raises:
            RefusedInput: a group size does not divide a dimension.
        """
        self._source = source
        layout = source.config.quantization or source.layout or (source.stored and source.stored.layout)
        self._layout = layout or int4_layout(QuantizationConfig())
        self._packed = find_packed_tensors(with_layout(source.config, self._layout))
        self._scales = source.scales_for(self._layout)

    def __contains__(self, name: str) -> bool:
        return name in self._packed

    def check_blocks(self, what: str, way_out: str) -> None:
        """Check that the groups are whole blocks of 32 values along the input axis.

        Args:
            what: what asks for them.
            way_out: what to do where they are not.

        Raises:
            RefusedInput: they are not.
        """
        quantization = QuantizationConfig(
            group_size=self._layout["group_size"],
            expert_group_size=self._layout.get("expert_group_size"),
            expert_group_axis="in" if self._layout["expert_group_axis"] == EXPERT_GROUP_AXES["in"] else "out",
        )
        if reason := explain_block_misfit(dims_from_config(self._source.config), quantization):
            raise RefusedInput(
                f"{what}: {reason}; {way_out}, or train with --quantization.expert-group-axis in and groups of 32"
            )

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int8 values in -8..7 of the weight's shape, and float16 scales, grouped along the weight's axis."""
        packed, tensors = self._packed[name], self._source.tensors
        if not self._source.is_int4:
            return quantize_tensor(tensors[name], packed, self._scales)
        q = map_chunks(lambda part: unpack_int4(part, packed.dim), tensors[packed.qweight_name])
        return q, tensors[packed.scale_name]

    def dequantize(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return q * scale, which is exact in float32, rounded once to `dtype`."""
        packed = self._packed[name]

        def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return dequantize_int4(q, scale, packed.dim, packed.group_size).to(dtype)

        return map_chunks(dequantize, *self.read(name))


def pack_words(q: torch.Tensor) -> torch.Tensor:
    """Return int8 values in -8..7 [..., n] plus 8 as bytes [..., n / 2], the first value in the lowest bits.

    Seen as words of 32 bits, these are the words of MLX and of compressed-tensors.
    """
    return map_chunks(lambda part: pack_int4(part + 8, q.dim() - 1), q)


def to_bfloat16_blocks(name: str, scale: torch.Tensor, num_values: int) -> torch.Tensor:
    """Return float16 scales [..., groups] of rows of `num_values` as bfloat16, one for each block of 32.

    Raises:
        RefusedInput: a scale is not exact in bfloat16.
    """
    if not scale.equal(scale.bfloat16().half()):
        raise RefusedInput(
            f"{name}: a scale of the INT4 checkpoint is not exact in bfloat16, as this format has them; export to gguf"
        )
    return scale.bfloat16().repeat_interleave(num_values // INT4_BLOCK // scale.shape[-1], dim=-1)
