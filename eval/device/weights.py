"""This module reads any checkpoint as INT4 values and scales, tensor by tensor, for the device program."""

import torch

from core.errors import RefusedInput
from eval.export.dimensions import int4_layout, with_layout
from eval.export.int4 import cast_unquantized, derive_scale, find_packed_tensors, quantize_tensor
from eval.export.source import Source
from eval.hf_mobilemoe.checkpoint_mobilemoe import PackedTensor, dequantize_int4, unpack_int4
from eval.hf_mobilemoe.configuration_mobilemoe import EXPERT_GROUP_AXES, MobileMoEConfig
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import quantize_int4


class DeviceWeights:
    """INT4 values and scales by released tensor names; each is computed when it is read, and not kept.

    For an INT4 checkpoint, they are the stored values and scales. For another checkpoint, they are the ones that the
    INT4 format would store. The experts can get another group size; then they are rounded again, from the unquantized
    weights if the checkpoint has them.

    Args:
        expert_group_size: number of values along the input dimension that share a scale in the experts; None takes the
            checkpoint's.

    Raises:
        RefusedInput: a dimension, the routing or the grouped axis is one that the fused op cannot take.
    """

    def __init__(self, source: Source, expert_group_size: int | None = None):
        self.config = source.config
        # Scales that are stored beside a float folder are used only if they have the default layout. The fused op takes
        # groups along the input only, so a folder that was imported with groups along the output is rounded again.
        layout = source.config.quantization or source.layout or int4_layout(QuantizationConfig())
        if expert_group_size is None:
            expert_group_size = layout.get("expert_group_size", layout["group_size"])
        self.layout, self.expert_group_size = layout, expert_group_size
        check_fused_op(self.config, layout, self.expert_group_size)
        self._source, self._scales = source, source.scales_for(layout)
        self._packed = find_packed_tensors(with_layout(self.config, layout))

    def read_unquantized(self, name: str) -> torch.Tensor:
        """Return an unquantized tensor as float32, rounded to bfloat16 where the INT4 folder rounds it."""
        return cast_unquantized(name, self._source.tensors[name]).float()

    def read_matrix(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int8 values in -8..7 in the weight's shape, and one float16 scale for each group along its axis."""
        packed = self._packed[name]
        if self._source.is_int4:
            return self._read_stored(packed)
        return quantize_tensor(self._source.tensors[name], packed, self._scales)

    def read_expert_matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts' values [E, out, in] and scales [E, out, in / group]; checkpoints have [E, in, out]."""
        packed = self._packed[name]
        if self.expert_group_size == packed.group_size:
            q, scale = self.read_matrix(name)
        else:
            if self._source.is_int4:
                weight = dequantize_int4(*self._read_stored(packed), packed.dim, packed.group_size)
            else:
                weight = self._source.tensors[name]
            scale = derive_scale(weight, packed.dim, self.expert_group_size, name)
            q = quantize_int4(weight, scale, packed.dim, self.expert_group_size)
        return q.transpose(1, 2), scale.transpose(1, 2)

    def _read_stored(self, packed: PackedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = self._source.tensors
        return unpack_int4(tensors[packed.qweight_name], packed.dim), tensors[packed.scale_name]


def check_fused_op(config: MobileMoEConfig, layout: dict, expert_group_size: int) -> None:
    """Check a model and its INT4 layout against what `llama::quantized_moe_ffn` and XNNPACK's linears take.

    Raises:
        RefusedInput: the model or the layout does not fit; the message names the key.
    """
    if layout["expert_group_axis"] != EXPERT_GROUP_AXES["in"]:
        raise RefusedInput(
            f"quantization.expert_group_axis is {layout['expert_group_axis']!r}: the fused op groups the experts "
            "along the input axis. Train with --quantization.expert-group-axis in, or give the bf16 folder, "
            "whose experts are then rounded along that axis"
        )
    score_func = getattr(config, "scoring_func", "sigmoid")
    if score_func != "sigmoid":
        raise RefusedInput(
            f"scoring_func is {score_func!r}: the fused op takes an expert bias with sigmoid routing only"
        )
    if expert_group_size < 32 or expert_group_size % 32:
        raise RefusedInput(f"expert_group_size is {expert_group_size}; the fused op takes a multiple of 32, from 32")
    for key in ("hidden_size", "intermediate_size"):
        if getattr(config, key) % expert_group_size:
            raise RefusedInput(
                f"{key} is {getattr(config, key)}, no multiple of the experts' group of {expert_group_size}; "
                "the fused op takes whole groups only"
            )
    for key in ("group_size", "embedding_group_size"):
        if layout[key] % 32:
            raise RefusedInput(f"quantization.{key} is {layout[key]}; XNNPACK's linears take a multiple of 32")
    if config.intermediate_size_mlp % layout["group_size"]:
        raise RefusedInput(
            f"intermediate_size_mlp is {config.intermediate_size_mlp}, no multiple of the group of "
            f"{layout['group_size']}; XNNPACK's linears take whole groups only"
        )
