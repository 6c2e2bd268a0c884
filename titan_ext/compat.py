"""Private interfaces of torch and torchtitan that titan_ext uses. No other file of titan_ext imports them.

Each has a test in tests/titan_ext/test_contracts.py that names what breaks when a new version changes it.
"""

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

__all__ = [
    "ReduceScatter",
    "get_param_groups",
    "is_being_gathered",
    "move_param_groups",
    "reduces_on_one_rank",
    "return_hidden_states",
    "set_reduce_scatter",
]


def get_param_groups(module: FSDPModule) -> list[FSDPParamGroup]:
    """Return FSDP2's parameter groups of one unit. `fully_shard` makes one a mesh and offers no way to see them."""
    return module._get_fsdp_state()._fsdp_param_groups


def reduces_on_one_rank(group: FSDPParamGroup) -> bool:
    """Return whether FSDP2 reduces the group's gradients with nobody: one shard, and no replicas of the model."""
    return not isinstance(group.mesh_info, DDPMeshInfo) and group._reduce_scatter_process_group.size() == 1


def set_reduce_scatter(group: FSDPParamGroup, reduce_scatter: ReduceScatter) -> None:
    """Replace a group's reduce-scatter, and leave out the division of the gradients before it.

    FSDPModule.set_custom_reduce_scatter refuses a unit that has several groups.
    """
    group._reduce_scatter_comm = reduce_scatter
    group.gradient_divide_factor = None


def move_param_groups(source: FSDPModule, target: FSDPModule) -> None:
    """Make `target`'s hooks gather the parameters of `source` and reduce their gradients, and remove `source`'s hooks.

    `fully_shard` offers no way to give a part of a unit another mixed-precision policy.
    """
    source_state, target_state = source._get_fsdp_state(), target._get_fsdp_state()
    for group in source_state._fsdp_param_groups:
        group.modules = target_state._modules  # FSDP2 prefetches groups of the same modules together
    target_state._fsdp_param_groups.extend(source_state._fsdp_param_groups)
    source_state._fsdp_param_groups.clear()
    source_state._pre_forward_hook_handle.remove()
    source_state._post_forward_hook_handle.remove()


def is_being_gathered(value: object) -> bool:
    """Return whether `value` is a DTensor whose local tensor is the result of a collective that still runs."""
    return isinstance(value, DTensor) and isinstance(value._local_tensor, AsyncCollectiveTensor)


def return_hidden_states(model: torch.nn.Module) -> None:
    """Make torchtitan's Decoder return what its output projection takes, [B, L, D], instead of logits."""
    model._skip_lm_head = True
