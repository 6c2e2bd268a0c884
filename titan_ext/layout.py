"""The parts of a layout that a recipe may leave open: what is computed again, and whether blocks are compiled."""

from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from titan_ext.config import ModelDims, ParallelConfig, Recomputation, StageConfig
from titan_ext.memory import estimate_memory

RECOMPUTATION: tuple[Recomputation, ...] = get_args(Recomputation)
SPARE = 0.1
"""Share of a GPU's memory that the estimate must leave: for fragmentation, NCCL's buffers and the driver."""
AMPLE = 0.25
"""Share that it must leave where recomputation is chosen by it: on a GPU the estimate was never measured, and less
recomputation gains less than a run loses that ends for want of memory."""
GPU_MEMORY = 80_000_000_000
"""Bytes of a GPU's memory where nothing states another number."""


def settle_layout(
    dims: ModelDims, stages: Iterable[StageConfig], parallel: ParallelConfig, gpu_memory: int | None
) -> ParallelConfig:
    """Return the layout with the values that stand for None in `activation_checkpoint` and `compile`.

    On the CPU these are: nothing computed again, nothing compiled. On a GPU blocks are compiled, and the backward pass
    computes as little again as leaves an ample share of the memory in all stages; all of a block where nothing does.

    Args:
        gpu_memory: bytes of a GPU's memory; None for training on the CPU.
    """
    compiled = gpu_memory is not None if parallel.compile is None else parallel.compile
    settled = replace(parallel, compile=compiled)
    if parallel.activation_checkpoint is not None:
        return settled
    if gpu_memory is None:
        return replace(settled, activation_checkpoint="none")
    choices = [replace(settled, activation_checkpoint=name) for name in RECOMPUTATION]
    trained = [stage for stage in stages if stage.steps]
    fitting = (
        choice
        for choice in choices
        if all(estimate_memory(dims, stage, choice).peak <= gpu_memory * (1 - AMPLE) for stage in trained)
    )
    return next(fitting, choices[-1])
