"""Reductions of FSDP2 that differ on the CPU (2 in titan_ext/cpu/__init__.py)."""

from collections.abc import Sequence

import torch
from torch.distributed.fsdp import FSDPModule

from titan_ext import compat
from titan_ext.cpu.device import IS_CPU


class OneRankReduceScatter(compat.ReduceScatter):
    """Reduce-scatter of a group of one rank: it leaves out FSDP2's copy of the input into the output.

    FSDP2 asks for a block for the input, copies all gradients into it, asks for a block for the output, and calls the
    reduction. With one rank the output equals the input, so both requests get the same block. A training step of a
    model of S width takes 1.07 times as long without this class (float32, median of paired steps on one rank).
    """

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a new block for the input, then the same block for the output."""
        if self._input is None:
            self._input = torch.empty(*size, dtype=dtype, device=device)
            return self._input
        output, self._input = self._input, None
        assert output.shape == tuple(size) and output.dtype == dtype, "FSDP2 allocates in another order"
        return output

    def __call__(self, *args: object, **kwargs: object) -> None:
        """Refuse to communicate: FSDP2 calls the reduction in groups of several ranks only."""
        raise AssertionError("FSDP2 communicates in a group of one rank")


def adapt_reductions(model: torch.nn.Module) -> None:
    """Make every FSDP unit of `model` reduce gradients with SUM, because gloo refuses FSDP2's PREMUL_SUM.

    Groups of one rank get a `OneRankReduceScatter`, and no factor to divide by: torchtitan's division by one would copy
    the gradients once more. The function changes nothing on an accelerator.
    """
    if not IS_CPU:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            for group in compat.get_param_groups(module):
                if compat.reduces_on_one_rank(group):
                    compat.set_reduce_scatter(group, OneRankReduceScatter())
