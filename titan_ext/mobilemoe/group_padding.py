"""Rows of zeros that make every expert's group as long as a grouped product wants, added and taken away by gathers.

torch's grouped product in bfloat16 takes groups of any length, empty ones too: the only operand that it reads along the
rows of a group, for the gradient of the weights, has the width as its contiguous dimension. In float8 both operands
must be contiguous along those rows, and the copy engine (TMA) needs 16 bytes, so a group must be a multiple of 16 rows;
and it must not be empty (aten/src/ATen/native/cuda/GroupMMCommon.cuh, prepare_grouped_gemm_data).

Shape suffixes: R rows, S = R + 1, P padded rows, D width, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from titan_ext.cpu.device import IS_CPU
from titan_ext.mobilemoe.row_gather import gather_rows


@dataclass(frozen=True, kw_only=True)
class Padding:
    """The places of rows among the padded ones. A row of zeros after the last row stands for all padding.

    So no number is out of range where there are no rows, and gradients of padding are 0 without a mask.
    """

    counts_E: torch.Tensor
    """int64, number of padded rows of each expert: a multiple, and never 0."""
    padded_S: torch.Tensor
    """int64, place of each row among the padded ones; 0 for the row of zeros."""
    row_P: torch.Tensor
    """int64, row that each padded one holds; R for padding."""

    def add(self, x_RD: torch.Tensor) -> torch.Tensor:
        """Return the padded rows [P, D]; padding is 0."""
        return gather_rows(F.pad(x_RD, (0, 0, 0, 1)), self.row_P, self.padded_S.unsqueeze(1))

    def remove(self, x_PD: torch.Tensor) -> torch.Tensor:
        """Return the rows [R, D] of the padded ones."""
        return gather_rows(x_PD, self.padded_S, self.row_P.unsqueeze(1))[:-1]


@torch.no_grad()
def pad_groups_to(multiple: int, counts_E: torch.Tensor, num_rows: int) -> Padding:
    """Return the padding of groups of rows to multiples of `multiple`, at least one multiple each.

    On a GPU the number of padded rows is the most that the groups can need, so that the host need not wait for their
    lengths. The last rows belong to no group then.

    Args:
        counts_E: int64, number of rows of each expert.
        num_rows: R, their sum.
    """
    padded_E = ((counts_E + multiple - 1) // multiple).clamp(min=1) * multiple
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    row_R = torch.arange(num_rows, device=counts_E.device)
    padded_R = row_R + shift_E.repeat_interleave(counts_E, output_size=num_rows)
    # A group fills whole multiples, and one more at most.
    most = (num_rows // multiple + len(counts_E)) * multiple
    num_padded = int(padded_E.sum()) if IS_CPU else most
    row_P = torch.full((num_padded,), num_rows, device=counts_E.device).scatter(0, padded_R, row_R)
    return Padding(counts_E=padded_E, padded_S=F.pad(padded_R, (0, 1)), row_P=row_P)
