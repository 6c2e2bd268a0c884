"""Rounds the weights of QAT once a step, on the shards, before FSDP2 gathers them.

Every micro-batch gathers a weight twice, and the head serves eight chunks of a sequence. What is gathered is on the
INT4 grid already, in the computing dtype, so nothing is left to do there. The gradient of a gathered weight is the
gradient of the master weight: the straight-through estimator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_ext import compat
from titan_ext.cpu.device import IS_CPU
from titan_ext.cpu.kernels import fuse_if_large
from titan_ext.dtensor import local
from titan_ext.quantization.formulas import round_to_bfloat16, round_to_int4
from titan_ext.quantization.qat import QATModule


@dataclass(frozen=True)
class RoundedShard:
    """This rank's shard of a weight that is rounded before it is gathered."""

    parameter: compat.ShardedParameter
    axis: int
    """Axis along which weights are grouped, from 0."""
    group_size: int


class RoundedShards:
    """Rounds the shards of a rank's models before a forward pass gathers them; of models without QAT there are none."""

    def __init__(self, model_parts: list[nn.Module], compile_backend: str | None):
        """Prepare the models, which FSDP2 has sharded.

        Args:
            compile_backend: backend of torch.compile for the rounding on an accelerator; None rounds uncompiled there.
        """
        self._round = _choose_rounding(compile_backend)
        self._is_step = False
        found = [(list_groups(model), find_rounded_shards(model), model) for model in model_parts]
        self._models = [(groups, shards) for groups, shards, _ in found if shards]
        for groups, shards, model in found:
            if shards:
                self._register(model, groups, shards)

    def _register(self, model: nn.Module, groups: list[Any], shards: list[RoundedShard]) -> None:
        def round_before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._is_step:
                self._round_model(groups, shards)

        # Before FSDP2's own hook: its streams begin to wait there for what was computed so far.
        model.register_forward_pre_hook(round_before_forward, prepend=True, with_kwargs=True)

    @contextmanager
    def rounded_once(self) -> Iterator[None]:
        """Round the weights now and not at the forward passes of this block; outside of one, every forward rounds.

        The weights must not change before the last pass of the block.
        """
        self.round_now()
        self._is_step = True
        try:
            yield
        finally:
            self._is_step = False

    def round_now(self) -> None:
        """Round the weights. The schedules of pipelines gather them before a model's forward pass begins."""
        for groups, shards in self._models:
            self._round_model(groups, shards)

    @torch.no_grad()
    def _round_model(self, groups: list[Any], shards: list[RoundedShard]) -> None:
        compat.start_groups(groups)
        with spmd.no_typecheck():
            for shard in shards:
                weight = local(shard.parameter.sharded_param)
                dtype = shard.parameter.param_dtype or weight.dtype
                rounded = self._round(group_weight(weight, shard.axis, shard.group_size), dtype)
                compat.gather_instead(shard.parameter, rounded.view(weight.shape))


def find_rounded_shards(model: nn.Module) -> list[RoundedShard]:
    """Return the shards of all weights that are rounded before they are gathered, and tell their modules so.

    A module's weights are left to the module where a shard's edge cuts a group. FSDP2 shards the first axis, which is
    grouped in no weight; of experts that are fewer than ranks, torchtitan shards the second.
    """
    parameters = {
        owner: parameter
        for group in list_groups(model)
        for parameter in group.fsdp_params
        for owner in compat.get_owners(parameter)
    }
    found: dict[compat.ShardedParameter, RoundedShard] = {}
    for module in model.modules():
        if not isinstance(module, QATModule):
            continue
        weights = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1}
        shards = [
            RoundedShard(parameters[module, name], module.axis % weight.dim(), module.group_size)
            for name, weight in weights.items()
        ]
        if all(shard.parameter.padded_sharded_param_size[shard.axis] % shard.group_size == 0 for shard in shards):
            module.rounds_weights = False
            found |= {shard.parameter: shard for shard in shards}  # a tied weight has two modules
    return list(found.values())


def list_groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's parameter groups of a model and of the modules in it."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return list(dict.fromkeys(group for unit in units for group in compat.get_param_groups(unit)))


def group_weight(weight: torch.Tensor, axis: int, group_size: int) -> torch.Tensor:
    """Return a contiguous weight as groups: [G, group_size], or [G, group_size, B] if `axis` is not the last.

    So weights of all shapes share a compiled function.
    """
    if axis == weight.dim() - 1:
        return weight.reshape(-1, group_size)
    return weight.reshape(-1, group_size, weight.shape[axis + 1 :].numel())


def round_groups(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 groups [G, group_size] or [G, group_size, B] rounded to the grid of their values in `dtype`.

    The cast to `dtype` comes first, as if the gathered weights were rounded; the exporters read a checkpoint in this
    way too. The result has that dtype.
    """
    computed = round_to_bfloat16(groups) if dtype == torch.bfloat16 else groups
    return round_to_int4(computed, 1, groups.shape[1]).to(dtype)


def _choose_rounding(compile_backend: str | None) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
    if IS_CPU or compile_backend is None:
        return fuse_if_large(round_groups)
    return torch.compile(round_groups, backend=compile_backend, fullgraph=True)
