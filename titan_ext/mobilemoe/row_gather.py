"""Moves tokens to the experts' rows and back by gathers alone, in the forward and in the backward pass.

    gather_rows:  row_r = x_token(r)
    sum_rows:     out_t = sum over the K choices k of token t of weight_tk * row_row(t, k)

Each is the other's gradient, so neither needs a scatter. PyTorch's own gradient of an indexed read adds every row into
its token: in bfloat16 it rounds after each addition, and on a GPU the order of the additions changes from run to run.
Here a sum over the choices of a token is made in one go, in float32 for bfloat16 rows, in the order of the choices.

Shape suffixes: T tokens, K choices a token, R rows, D width.
"""

from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F

from titan_ext.cpu.device import IS_CPU


def gather_rows(
    x_TD: torch.Tensor, token_R: torch.Tensor, row_TK: torch.Tensor, kept_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the rows [R, D] of the tokens `token_R`.

    Args:
        x_TD: tokens of any float dtype.
        token_R: int64, token that each row holds.
        row_TK: int64, rows that hold each token: the reverse of `token_R`, for the gradient. A row that no choice names
            gets no gradient, whatever token it holds.
        kept_TK: bool, whether a choice has a row. The numbers in `row_TK` of the others are valid, but not read. None:
            all have one.
    """
    return _GatherRows.apply(x_TD, token_R, row_TK, kept_TK)


def sum_rows(
    rows_RD: torch.Tensor,
    weight_TK: torch.Tensor,
    row_TK: torch.Tensor,
    token_R: torch.Tensor,
    weight_R: torch.Tensor,
    kept_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weighted sum of each token's rows [T, D], in the dtype of the rows. The weights get a gradient too.

    Args:
        rows_RD: rows of any float dtype.
        weight_TK: float, weight of each choice.
        row_TK, kept_TK: as in `gather_rows`; a choice without a row adds nothing.
        token_R, weight_R: the same read from the other side, for the gradient: int64, the token of each row, and
            float, its weight there; 0 for a row that no choice names.
    """
    return _SumRows.apply(rows_RD, weight_TK, row_TK, token_R, weight_R, kept_TK)


@spmd.register_local_autograd_function
class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, token_R: torch.Tensor, row_TK: torch.Tensor, kept_TK: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        row_TK, kept_TK = ctx.saved_tensors
        return _sum(grad_RD, row_TK, kept_TK), None, None, None


@spmd.register_local_autograd_function
class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: torch.Tensor,
        weight_TK: torch.Tensor,
        row_TK: torch.Tensor,
        token_R: torch.Tensor,
        weight_R: torch.Tensor,
        kept_TK: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_RD, row_TK, token_R, weight_R, kept_TK)
        ctx.weight_dtype = weight_TK.dtype
        return _sum(rows_RD, row_TK, weight_TK if kept_TK is None else torch.where(kept_TK, weight_TK, 0))

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None]:
        rows_RD, row_TK, token_R, weight_R, kept_TK = ctx.saved_tensors
        dtype = _sum_dtype(rows_RD)
        grad_RD = grad_TD.index_select(0, token_R).to(dtype)
        product_R = (rows_RD.to(dtype) * grad_RD).sum(-1)
        grad_TK = product_R.index_select(0, row_TK.flatten()).view(row_TK.shape).to(ctx.weight_dtype)
        if kept_TK is not None:
            grad_TK = torch.where(kept_TK, grad_TK, 0)
        return (grad_RD * weight_R.to(dtype).unsqueeze(-1)).to(rows_RD.dtype), grad_TK, None, None, None, None


def _sum_dtype(rows: torch.Tensor) -> torch.dtype:
    """Return the dtype of sums: float32, or float64 for rows in float64."""
    return torch.promote_types(rows.dtype, torch.float32)


def _sum(rows_RD: torch.Tensor, row_TK: torch.Tensor, weight_TK: torch.Tensor | None) -> torch.Tensor:
    """Return the weighted sum of each token's rows [T, D]; the weights may be bool, and None stands for 1."""
    K, dtype = row_TK.shape[1], _sum_dtype(rows_RD)
    if K == 1 and weight_TK is None:
        return rows_RD.index_select(0, row_TK.flatten())
    weight_TK = None if weight_TK is None else weight_TK.to(dtype)
    if IS_CPU and not torch.compiler.is_compiling():  # 12 in titan_ext/cpu/__init__.py
        return F.embedding_bag(row_TK, rows_RD.to(dtype), mode="sum", per_sample_weights=weight_TK).to(rows_RD.dtype)
    # Compiled, this is one kernel that reads K rows for each token and writes the token.
    parts = []
    for k in range(K):
        part_TD = rows_RD.index_select(0, row_TK[:, k]).to(dtype)
        parts.append(part_TD if weight_TK is None else part_TD * weight_TK[:, k : k + 1])
    total_TD = parts[0]
    for part_TD in parts[1:]:
        total_TD = total_TD + part_TD
    return total_TD.to(rows_RD.dtype)
