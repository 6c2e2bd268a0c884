"""Keeps the embedding tied under pipeline parallelism, and gives the last stage's loss to all stages.

Embedding and output projection are one matrix. The first pipeline stage computes the embedding and the last one the
projection. As in Megatron-LM both stages hold the matrix. The first stage owns it: it has the gradient that counts and
the only optimizer state, under the names that a checkpoint without stages has. The last stage holds a replica. The
replica's gradient is added to the owner's before the gradient norm is taken, and the owner's values are copied to the
replica after every update. Both stages shard the matrix alike over FSDP and tensor parallelism, so rank i of one stage
exchanges its shard with rank i of the other.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from titan_ext.dtensor import local

TIED_SCHEDULES = ("1F1B", "Interleaved1F1B")
"""Pipeline schedules that are supported: they put the first stage on the first rank of the pipeline and the last stage
on its last rank."""
_OWNER, _REPLICA = "tok_embeddings", "lm_head"


class TiedEmbedding:
    """Exchanges gradient and values between the owner of the tied matrix and its replica.

    Ranks of other stages do nothing.
    """

    def __init__(self, model_parts: list[nn.Module], parallel_dims: ParallelDims):
        self._group = parallel_dims.get_mesh("pp").get_group()
        self._last = self._group.size() - 1
        self._owner = _find_weight(model_parts, _OWNER)
        self._replica = _find_weight(model_parts, _REPLICA)

    @torch.no_grad()
    def reduce_tied_grad(self) -> None:
        """Add the replica's gradient to the owner's and set the replica's to None.

        Call it once per optimizer step, before the gradient norm is taken.
        """
        if self._replica is not None:
            assert self._replica.grad is not None, "call it after the backward pass"
            dist.send(local(self._replica.grad), group=self._group, group_dst=0)
            self._replica.grad = None
        if self._owner is not None:
            assert self._owner.grad is not None, "call it after the backward pass"
            owner_grad = local(self._owner.grad)
            replica_grad = torch.empty_like(owner_grad)
            dist.recv(replica_grad, group=self._group, group_src=self._last)
            owner_grad.add_(replica_grad)

    @torch.no_grad()
    def sync_tied_weight(self) -> None:
        """Copy the owner's values to the replica. Call it before the first step and after every update."""
        if self._owner is not None:
            dist.send(local(self._owner), group=self._group, group_dst=self._last)
        if self._replica is not None:
            dist.recv(local(self._replica), group=self._group, group_src=0)


def exclude_tied_replica(optimizers: OptimizersContainer) -> None:
    """Remove the replica from this rank's optimizers, before they hold any state."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if (name := f"{_REPLICA}.weight") in group["param_names"]:
                i = group["param_names"].index(name)
                del group["params"][i], group["param_names"][i]


def broadcast_from_last_stage(value: torch.Tensor, parallel_dims: ParallelDims) -> torch.Tensor:
    """Return the last stage's `value`, a tensor of one element, on every stage. A collective: every rank must call it.

    Without pipeline parallelism it returns `value` unchanged.
    """
    if not parallel_dims.pp_enabled:
        return value
    group = parallel_dims.get_mesh("pp").get_group()
    value = local(value.detach()).clone().reshape(())
    dist.broadcast(value, group=group, group_src=group.size() - 1)
    return value


def _find_weight(model_parts: list[nn.Module], name: str) -> nn.Parameter | None:
    modules = [getattr(part, name) for part in model_parts if getattr(part, name) is not None]
    return modules[0].weight if modules else None
