"""The weights of any checkpoint as INT4 values and scales, tensor by tensor, for the device program."""

from collections.abc import Mapping
from pathlib import Path

import torch

from core.errors import RefusedInput
from eval.export.hf import open_tensors, read_config
from eval.export.int4 import quantize_int4, quantize_tensors, stored_scales, with_quantization
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_int4, packed_tensors, unpack_int4
from eval.hf_mobilemoe.configuration_mobilemoe import EXPERT_GROUP_AXES, MobileMoEConfig, describe_quantization

DENSE_GROUP_SIZE = 32


class DeviceWeights:
    """INT4 values and scales by released tensor names; each is computed when it is asked for, and not kept.

    Of an INT4 checkpoint they are the stored ones, of another what `eval.export.int4` would store. Experts can be given
    a larger group of their own: then they are rounded again, from the unquantized weights where those are at hand.

    Args:
        tensors: the checkpoint's tensors, as `checkpoint_shapes(config)` has them.
        config: with `quantization` if the tensors are INT4.
        scales: of an unquantized checkpoint that lies on an INT4 grid, by the names of the INT4 one.
        layout: what an unquantized checkpoint is rounded to (`describe_quantization`); groups of 32 by default.
        expert_group_size: values along the input dimension that share a scale in the experts; None: as the rest.

    Raises:
        RefusedInput: a dimension, the routing or the grouped axis is one that the fused op cannot take.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: MobileMoEConfig,
        scales: Mapping[str, torch.Tensor] | None = None,
        layout: dict | None = None,
        expert_group_size: int | None = None,
    ):
        self.config = config
        self.is_int4 = config.quantization is not None
        quantization = config.quantization or layout or describe_quantization(DENSE_GROUP_SIZE, "in")
        self.expert_group_size = expert_group_size or quantization.get("expert_group_size", quantization["group_size"])
        check_fused_op(config, quantization, self.expert_group_size)
        self._tensors, self._scales = tensors, scales
        self._config = with_quantization(config, quantization)
        self._packed = packed_tensors(config, quantization)

    def plain(self, name: str) -> torch.Tensor:
        """An unquantized tensor, float32; what the INT4 folder rounds to bfloat16 is rounded here too."""
        ((_, tensor),) = quantize_tensors([(name, self._tensors[name])], self._config)
        return tensor.float()

    def matrix(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 values in -8..7 in the weight's shape, float16 scales with one entry a group along its grouped axis."""
        packed = self._packed[name]
        if self.is_int4:
            qweight, scale = self._tensors[packed.qweight_name], self._tensors[packed.scale_name]
        else:
            stored = dict(quantize_tensors([(name, self._tensors[name])], self._config, self._scales))
            qweight, scale = stored[packed.qweight_name], stored[packed.scale_name]
        return unpack_int4(qweight, packed.dim), scale

    def expert_matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' values [E, out, in] and scales [E, out, in / group]: the released order has in before out."""
        packed = self._packed[name]
        if self.expert_group_size == packed.group_size:
            q, scale = self.matrix(name)
        else:
            weight = dequantize_int4(*self.matrix(name), packed.dim, packed.group_size) if self.is_int4 else None
            weight = self._tensors[name] if weight is None else weight
            q, scale = quantize_int4(weight, packed.dim, self.expert_group_size)
        return q.transpose(1, 2), scale.transpose(1, 2)


def open_folder(folder: Path, expert_group_size: int | None = None) -> DeviceWeights:
    """The weights of a Hugging Face folder, INT4 or not, or of an imported checkpoint.

    Raises:
        RefusedInput: no complete checkpoint there, or one the fused op cannot take.
    """
    config = read_config(folder)
    tensors = open_tensors(folder, config)
    scales = None
    if config.quantization is None:
        scales = stored_scales(folder, with_quantization(config, describe_quantization(DENSE_GROUP_SIZE, "in")))
    return DeviceWeights(tensors, config, scales, expert_group_size=expert_group_size)


def check_fused_op(config: MobileMoEConfig, quantization: dict, expert_group_size: int) -> None:
    """Refuse, by its name, what `llama::quantized_moe_ffn` or XNNPACK's grouped linears cannot take."""
    if quantization["expert_group_axis"] != EXPERT_GROUP_AXES["in"]:
        raise RefusedInput(
            f"quantization.expert_group_axis is {quantization['expert_group_axis']!r}: the fused op groups the experts "
            "along the input axis. Train with --export.expert-group-axis in, or give the bf16 folder, whose experts "
            "are then rounded along that axis"
        )
    score_func = getattr(config, "scoring_func", "sigmoid")
    if score_func != "sigmoid":
        raise RefusedInput(
            f"scoring_func is {score_func!r}: the fused op takes an expert bias with sigmoid routing only"
        )
    if expert_group_size % 32:
        raise RefusedInput(f"expert_group_size is {expert_group_size}; the fused op takes a multiple of 32")
    for key in ("hidden_size", "intermediate_size"):
        if getattr(config, key) % expert_group_size:
            raise RefusedInput(
                f"{key} is {getattr(config, key)}, no multiple of the experts' group of {expert_group_size}; "
                "the fused op takes whole groups only"
            )
    for key in ("group_size", "embedding_group_size"):
        if quantization[key] % 32:
            raise RefusedInput(f"quantization.{key} is {quantization[key]}; XNNPACK's linears take a multiple of 32")
    if config.intermediate_size_mlp % quantization["group_size"]:
        raise RefusedInput(
            f"intermediate_size_mlp is {config.intermediate_size_mlp}, no multiple of the group of "
            f"{quantization['group_size']}; XNNPACK's linears take whole groups only"
        )
