"""INT4 quantization-aware training: fake-quantized weights and activations for every matrix of the model.

Weights: symmetric, groups of 32 along the input dimension, scale max|W| / 7.5 rounded to bfloat16, values
round(W / scale) clamped to [-8, 7] (arXiv 2605.27358, section QAT). Activations: asymmetric INT8 a token, ranges taken
from core.errors import RefusedInput
from the token itself, as XNNPACK's dynamically quantized linears and ExecuTorch's fused MoE op do.
Weights through torchao's primitives, activations by its arithmetic; the gradient goes straight through. Norms and
router stay float32.

The scale is rounded to a number that bfloat16 (XNNPACK), float16 (the `mobilemoe-int4-g32` file) and float32 (the
device's op) all hold exactly, so training, the exported files and the device use the same grid.

Shape suffixes: see titan_ext/mobilemoe/moe.py.
"""

from dataclasses import dataclass, fields

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from torchtitan.models.common import Embedding, Linear

from core.errors import RefusedInput
from titan_ext.config import QATConfig
from titan_ext.cpu.kernels import fuse_if_large
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.mobilemoe.moe import Experts, RouterGate

INT4_RANGE = (-8, 7)
INT8_RANGE = (-128, 127)
SMALLEST_SCALE = 2.0**-24
"""Smallest positive float16: the scale of a group that is all zero or too small for a larger one."""


def fake_quantize_weight(weight: torch.Tensor, group_size: int, axis: int = -1) -> torch.Tensor:
    """Round `weight` to the INT4 grid, group by group along `axis`; gradient 1 everywhere.

    Args:
        weight: float, any shape; the size along `axis` is a multiple of `group_size`.

    Returns:
        The dequantized values, in the weight's dtype and shape.

    Raises:
        RefusedInput: the size along `axis` is no multiple of `group_size`.
    """
    if weight.shape[axis] % group_size:
        raise RefusedInput(
            f"weight {tuple(weight.shape)}: {weight.shape[axis]} values along axis {axis} are no multiple of "
            f"group_size {group_size}; choose dimensions that are"
        )
    with torch.no_grad():
        rounded = _round_to_grid(weight, group_size, axis)
    return _StraightThrough.apply(weight, rounded)


@fuse_if_large
def _round_to_grid(weight: torch.Tensor, group_size: int, axis: int) -> torch.Tensor:
    block_size = [1] * weight.dim()
    block_size[axis] = group_size
    float_weight = weight.float()
    scale, zero_point = choose_qparams_affine(
        float_weight,
        MappingType.SYMMETRIC,
        tuple(block_size),
        target_dtype=torch.int8,
        quant_min=INT4_RANGE[0],
        quant_max=INT4_RANGE[1],
        eps=SMALLEST_SCALE,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )
    scale = round_scale(scale)
    q = quantize_affine(float_weight, block_size, scale, zero_point, torch.int8, *INT4_RANGE)
    rounded = dequantize_affine(q, block_size, scale, zero_point, torch.int8, *INT4_RANGE, output_dtype=torch.float32)
    return rounded.to(weight.dtype)


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """`scale.bfloat16().half().float()` of positive float32 numbers below 65,280, so that torch.compile keeps it.

    A compiler that fuses the casts computes in float32 throughout and leaves the rounding out
    (torch._inductor.config.emulate_precision_casts), which would train on another grid than is exported.
    """
    bits = scale.view(torch.int32)
    bfloat16 = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    # Eight significant bits fit float16 until its numbers are too small to be normal: multiples of 2^-24.
    return torch.where(bfloat16 < 2.0**-14, torch.round(bfloat16 * 2.0**24) * 2.0**-24, bfloat16)


@spmd.register_local_autograd_function
class _StraightThrough(torch.autograd.Function):
    """The rounded values forward, the gradient of the unrounded ones backward; no pass over the values is needed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def fake_quantize_activation(x: torch.Tensor) -> torch.Tensor:
    """Round every token (last dimension) of `x` to its own asymmetric INT8 grid; gradient 1 everywhere."""
    with torch.no_grad():
        rounded = _round_tokens(x)
    return _StraightThrough.apply(x, rounded)


@fuse_if_large
def _round_tokens(x: torch.Tensor) -> torch.Tensor:
    """torchao's asymmetric grid, written out: its quantize_affine branches on the number of tokens.

    The router decides that number for an expert, which may get none, and one compiled graph must hold for all.
    """
    float_x = x.float()
    low = float_x.amin(dim=-1, keepdim=True).clamp(max=0)
    high = float_x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (INT8_RANGE[1] - INT8_RANGE[0])).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero_point = (INT8_RANGE[0] - torch.round(low / scale)).clamp(*INT8_RANGE)
    q = (torch.round(float_x * (1 / scale)) + zero_point).clamp(*INT8_RANGE)
    return ((q - zero_point) * scale).to(x.dtype)


class QATLinear(Linear):
    """Linear with INT4 weights grouped along the input dimension and INT8 activations."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        group_size: int = 32

    def __init__(self, config: Config):
        super().__init__(config)
        self.group_size = config.group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(fake_quantize_activation(input), fake_quantize_weight(self.weight, self.group_size), self.bias)


class QATEmbedding(Embedding):
    """Embedding with INT4 rows: the same grid as the output projection that it is tied to."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        group_size: int = 32

    def __init__(self, config: Config):
        super().__init__(config)
        self.group_size = config.group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Only the rows that are looked up are rounded: a row's groups do not depend on other rows.
        return fake_quantize_weight(F.embedding(input, self.weight), self.group_size)


class QATExperts(Experts):
    """Routed experts with INT4 weights and INT8 activations in front of both GEMMs."""

    @dataclass(kw_only=True, slots=True)
    class Config(Experts.Config):
        group_size: int = 32
        group_axis: str = "in"

    def __init__(self, config: Config):
        super().__init__(config)
        self.group_size = config.group_size
        # Stored [E, out, in]: the input dimension is the last.
        self.axis = {"in": -1, "out": -2}[config.group_axis]

    def local_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(fake_quantize_weight(w, self.group_size, self.axis) for w in super().local_weights())

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_activation(x)


_QAT_CLASSES = ((Linear, QATLinear), (Embedding, QATEmbedding), (Experts, QATExperts))


def convert_to_qat(config: MobileMoEModel.Config, qat: QATConfig) -> MobileMoEModel.Config:
    """Replace, in place, every linear, embedding and expert config but the router's by its fake-quantized kind."""
    for plain_class, qat_class in _QAT_CLASSES:
        extra = {"group_size": qat.group_size}
        if qat_class is QATExperts:
            extra = {"group_size": qat.expert_group_size or qat.group_size, "group_axis": qat.expert_group_axis}
        for _, old, parent, attribute in list(config.traverse(plain_class.Config)):
            if isinstance(old, RouterGate.Config):
                continue
            new = qat_class.Config(**{f.name: getattr(old, f.name) for f in fields(old)}, **extra)
            if isinstance(parent, list):
                parent[attribute] = new
            else:
                setattr(parent, attribute, new)
    return config
