"""Padding and compilation that make the CPU's kernels fast (10 and 11 in titan_ext/cpu/__init__.py).

Shape suffixes: R rows, P padded rows, D width, E experts.
"""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from core.cache import keep_compiled_code_apart
from core.errors import DamagedData
from titan_ext.cpu.device import IS_CPU

ROWS_MULTIPLE = 32
"""`pad_groups` rounds the number of rows of every expert up to a multiple of this number."""

COMPILED_ELEMENTS = 1 << 20
"""`fuse_if_large` compiles for tensors of at least this many elements. A fused kernel of that size saves more time in a
hundred steps than its compilation takes."""

CHECKED_SHAPES = 3
"""Number of shapes for each dtype and set of options on which a compiled function is compared with the uncompiled one.
The first is compiled for its own sizes, the second for any: these are two different programs."""


def pad_groups(x_RD: torch.Tensor, counts_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad every expert's group of rows with zeros to a multiple of `ROWS_MULTIPLE` rows.

    Args:
        x_RD: rows sorted by expert.
        counts_E: int64, number of rows of each expert.

    Returns:
        The padded rows [P, D], the number of padded rows of each expert int64 [E], and the index of every row of x
        among the padded rows int64 [R].
    """
    padded_E = (counts_E + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    rows_R = torch.arange(x_RD.shape[0]) + torch.repeat_interleave(shift_E, counts_E)
    padded_PD = x_RD.new_zeros(int(padded_E.sum()), x_RD.shape[1]).index_copy(0, rows_R, x_RD)
    return padded_PD, padded_E, rows_R


def fuse_if_large(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `function`, compiled on the CPU for large plain tensors.

    The function is returned unchanged on an accelerator, and where there is no C++ compiler. The first results of the
    compiled function are compared with those of `function`, bit for bit (`CHECKED_SHAPES`).

    Args:
        function: function whose first argument is a tensor. Its result must not depend on intermediate rounding, which
            fusion leaves out.

    Raises:
        DamagedData: by the returned function, if the compiled code computes something else.
    """
    # inductor takes the name of a program alone: with "ccache g++" it would find no compiler.
    if not IS_CPU or shutil.which(os.environ.get("CXX", "g++")) is None:
        return function
    keep_compiled_code_apart()
    compiled = torch.compile(function)
    checked: dict[tuple, set[torch.Size]] = {}

    @functools.wraps(function)
    def fused(x: torch.Tensor, *args: Any) -> torch.Tensor:
        # A compiled block traces through this function; its number of rows may be symbolic, so it cannot be compared.
        if torch.compiler.is_compiling():
            return function(x, *args)
        if x.numel() < COMPILED_ELEMENTS or isinstance(x, DTensor):
            return function(x, *args)
        result = compiled(x, *args)
        shapes = checked.setdefault((x.dtype, x.dim(), args), set())
        if len(shapes) < CHECKED_SHAPES and x.shape not in shapes:
            _compare_with_eager(function.__name__, result, function(x, *args))
            shapes.add(x.shape)
        return result

    return fused


def _compare_with_eager(name: str, compiled: torch.Tensor, eager: torch.Tensor) -> None:
    different = int((~torch.isclose(compiled, eager, rtol=0, atol=0, equal_nan=True)).sum())
    if different:
        raise DamagedData(
            f"compiled {name} differs from the uncompiled function in {different:,} of {eager.numel():,} values: the "
            f"compiled code in {os.environ.get('TORCHINDUCTOR_CACHE_DIR')} was made for another processor, or is "
            "damaged; remove that folder and start again"
        )
