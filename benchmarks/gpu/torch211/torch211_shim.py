"""The names that torchtitan 0.3.0 and the FSDP2 of torch 2.14 import and torch 2.11 lacks.

sitecustomize.py beside this file imports it where torch is 2.11. A name that torch has stays as it is.
"""

from typing import Any

import torch
import torch.compiler
import torch.distributed as dist
from torch.utils import _pytree as pytree


def _add(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        setattr(owner, name, value)


def _disable_typecheck() -> Any:
    import spmd_types

    return spmd_types.no_typecheck()


def _set_timeout(timeout: Any, group: Any = None) -> None:
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _collect_grad_tensors(output: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors in a module's output that need a gradient."""
    return tuple(value for value in pytree.tree_leaves(output) if _needs_gradient(value))


def _replace_grad_tensors(output: Any, tensors: tuple[torch.Tensor, ...]) -> Any:
    """Return the output with the tensors of `_collect_grad_tensors` replaced, in their order."""
    following = iter(tensors)
    return pytree.tree_map(lambda value: next(following) if _needs_gradient(value) else value, output)


def add_fsdp_helpers(owner: Any) -> None:
    """Add what the FSDP2 of torch 2.14 imports from `owner`, torch.distributed.fsdp._common_utils.

    This file must not import that module itself: it would load 2.11's FSDP2.
    """
    _add(owner, "collect_grad_tensors", _collect_grad_tensors)
    _add(owner, "replace_grad_tensors", _replace_grad_tensors)


_add(dist, "_is_spmd_types_available", lambda: True)
_add(dist, "_spmd_no_typecheck", _disable_typecheck)
_add(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from 2.12 on
_add(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_add(dist, "set_timeout", _set_timeout)
_add(torch.compiler, "_is_non_strict_tracing", lambda: False)  # a kind of tracing that 2.11 does not have
