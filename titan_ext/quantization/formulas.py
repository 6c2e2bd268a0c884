"""The arithmetic of INT4 weights and INT8 activations, for training, the exporters and the tests of the device's op.

INT4 weights (arXiv 2605.27358, section QAT): symmetric, a group of values along one axis shares the scale
s = max|w| / 7.5, and q = clamp(round(w * (1 / s)), -8, 7) stands for q * s.

INT8 activations, as torchao's ARM kernels and XNNPACK's dynamically quantized linears compute them: asymmetric, every
token (the last dimension) has a scale and a zero point of its own, from its own range widened to hold 0.

The C++ of the device's op states the INT8 rule once more (eval/device/expert_op/moe_ffn.cpp, quantize_row);
tests/eval/test_device_op.py holds it to this file.
"""

import torch

INT4_MIN, INT4_MAX = -8, 7
INT8_MIN, INT8_MAX = -128, 127
SMALLEST_INT4_SCALE = 2.0**-24
"""Smallest positive float16: the scale of a group that is all zero or too small for a larger one."""
LARGEST_INT4_SCALE = 65504.0
"""Largest finite float16."""
SMALLEST_INT8_SCALE = torch.finfo(torch.float32).smallest_normal
"""Smallest normal float32, 1.18e-38: the scale of a token that is all zero. Its reciprocal is finite."""


def int4_scale(weight: torch.Tensor, dim: int, group_size: int) -> torch.Tensor:
    """Return the scale of every group of `group_size` values along `dim`, float32, `dim` divided by `group_size`.

    max|w| / 7.5 by `round_scale`, at least SMALLEST_INT4_SCALE.

    Args:
        weight: float; `dim` may be negative and is a multiple of `group_size` long.
    """
    dim %= weight.dim()
    groups = weight.float().unflatten(dim, (-1, group_size))
    return round_scale(divide(groups.abs().amax(dim=dim + 1), 7.5)).clamp(min=SMALLEST_INT4_SCALE)


def divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return x / divisor, rounded to float32 once on every device.

    A GPU multiplies by the reciprocal of a number instead, which may fall on the other side of a rounding. In float64
    it does so too, and what is then rounded to float32 is the quotient's nearest.
    """
    return (x.double() / divisor).float()


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return `scale.bfloat16().half().float()` of float32 numbers in 0..65,280, by arithmetic that a compiler keeps.

    The result is a number that bfloat16 (XNNPACK), float16 (the `mobilemoe-int4-g32` file) and float32 (the device's
    op) all hold exactly, so that training, the exported files and the device use the same grid.

    A compiler that fuses the casts computes in float32 throughout and leaves the rounding out
    (torch._inductor.config.emulate_precision_casts), which would train on another grid than is exported.
    """
    bfloat16 = round_to_bfloat16(scale)
    # Eight significant bits fit float16 until its numbers are too small to be normal: multiples of 2^-24.
    return torch.where(bfloat16 < 2.0**-14, torch.round(bfloat16 * 2.0**24) * 2.0**-24, bfloat16)


def round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Return `x.bfloat16().float()` of float32 numbers, by arithmetic on the bits that a compiler keeps.

    It rounds to the nearest, ties to even. NaN stays NaN but for those whose payload has more than its top 8 bits.
    """
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


def quantize_int4(weight: torch.Tensor, scale: torch.Tensor, dim: int, group_size: int) -> torch.Tensor:
    """Return int8 values in -8..7 of the weight's shape: round(w * (1 / scale)), clamped.

    Args:
        scale: as `int4_scale` returns it; any float dtype. A group whose scale is 0 becomes 0.
        dim: grouped axis; may be negative.
    """
    dim %= weight.dim()
    groups = weight.float().unflatten(dim, (-1, group_size))
    # The reciprocal, as torchao and the device's packer: a division rounds +-7.5 differently.
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    q = (groups * inverse.unsqueeze(dim + 1)).round().clamp(INT4_MIN, INT4_MAX)
    return q.flatten(dim, dim + 1).to(torch.int8)


def round_to_int4(weight: torch.Tensor, dim: int, group_size: int) -> torch.Tensor:
    """Return the float32 values that INT4 storage of `weight` stands for: q * scale, in the weight's shape."""
    dim %= weight.dim()
    scale = int4_scale(weight, dim, group_size)
    q = quantize_int4(weight, scale, dim, group_size).unflatten(dim, (-1, group_size))
    return (q * scale.unsqueeze(dim + 1)).flatten(dim, dim + 1)


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the INT8 values, scale and zero point of every token of `x`: x is close to (q - zero_point) * scale.

    The formula is torchao's (choose_qparams_affine and quantize_affine, ASYMMETRIC). It is written out because
    torchao's branches on the number of tokens: the router decides that number for an expert, which may get none, and
    one compiled graph must hold for all.

    Args:
        x: float, [..., K].

    Returns:
        q [..., K], scale [..., 1] and zero_point [..., 1], all float32; q and zero_point are whole numbers in
        -128..127.
    """
    x = x.float()
    low = x.amin(dim=-1, keepdim=True).clamp(max=0)
    high = x.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = divide(high - low, INT8_MAX - INT8_MIN).clamp(min=SMALLEST_INT8_SCALE)
    zero_point = (INT8_MIN - torch.round(low / scale)).clamp(INT8_MIN, INT8_MAX)
    q = (torch.round(x * (1 / scale)) + zero_point).clamp(INT8_MIN, INT8_MAX)
    return q, scale, zero_point


def round_to_int8(x: torch.Tensor) -> torch.Tensor:
    """Return the float32 values that INT8 activations of `x` [..., K] stand for: (q - zero_point) * scale."""
    q, scale, zero_point = quantize_int8(x)
    return (q - zero_point) * scale
