"""Emulation of torchao's float8 grouped product on the CPU, which lacks its kernels (14 in titan_ext/cpu/__init__.py).

Operands are rounded by torchao's own functions, as its kernels round them, and multiplied in bfloat16, which holds
every rounded value exactly: four significant bits times a power of two. Sums are float32 in both, in another order.

Shape suffixes: R rows sorted by expert, K and N widths, E experts.
"""

from typing import Any

import torch

from titan_ext import compat


def emulate_grouped_product(a_RK: torch.Tensor, b_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Return what `titan_ext.compat.multiply_grouped_in_float8` returns, [R, N] in bfloat16.

    Args:
        a_RK: bfloat16.
        b_EKN: bfloat16.
        offsets_E: int32, end of each expert's rows.
    """
    return _EmulatedProduct.apply(a_RK, b_EKN, offsets_E)


class _EmulatedProduct(torch.autograd.Function):
    """Each of the three products has both operands rounded along the dimension that it sums over."""

    @staticmethod
    def forward(ctx: Any, a_RK: torch.Tensor, b_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a_RK, b_EKN, offsets_E)
        return torch._grouped_mm(_round(a_RK, -1), _round(b_EKN, -2), offs=offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_RN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        a_RK, b_EKN, offsets_E = ctx.saved_tensors
        grad_RN = grad_RN.contiguous()
        grad_RK = torch._grouped_mm(_round(grad_RN, -1), _round(b_EKN, -1).transpose(-2, -1), offs=offsets_E)
        grad_ENK = torch._grouped_mm(
            _round_groups(grad_RN, offsets_E).T, _round_groups(a_RK, offsets_E), offs=offsets_E
        )
        return grad_RK, grad_ENK.transpose(-2, -1), None


def _round(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return x with every vector along `dim` rounded to float8 by a scale of its own, in the dtype of x."""
    values, scale = compat.round_to_float8(x, dim)
    return (values.float() / scale).to(x.dtype)


def _round_groups(x_RD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Return x with every column of every expert's rows rounded to float8 by a scale of its own."""
    values_RD, scale_ED = compat.round_groups_to_float8(x_RD, offsets_E)
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    return (values_RD.float() / scale_ED.repeat_interleave(counts_E, dim=0)).to(x_RD.dtype)
