"""What pipeline parallelism needs beyond torchtitan: one matrix on two stages, and the loss on all of them.

Embedding and output projection are one matrix, and the first stage has the one, the last the other. As in Megatron-LM
both stages hold it: the first owns it, with the gradient that counts and the only optimizer state, under the names that
a checkpoint without stages has; the last holds a replica, whose gradient goes to the owner before the gradient norm is
taken and whose values come from the owner after every update. Both stages lay it out alike over FSDP and tensor
parallelism, so rank i of the one exchanges its shard with rank i of the other.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from titan_ext.dtensor import local

TIED_SCHEDULES = ("1F1B", "Interleaved1F1B")
"""Those offered; both have the first stage on the first rank of the pipeline and the last on its last."""
_OWNER, _REPLICA = "tok_embeddings", "lm_head"


class TiedStages:
    """The exchange between the owner of the tied matrix and its replica; ranks of other stages take no part."""

    def __init__(self, model_parts: list[nn.Module], parallel_dims: ParallelDims):
        self._group = parallel_dims.get_mesh("pp").get_group()
        self._last = self._group.size() - 1
        self._owner = _weight(model_parts, _OWNER)
        self._replica = _weight(model_parts, _REPLICA)

    @torch.no_grad()
    def give_gradient_to_owner(self) -> None:
        """Add the replica's gradient to the owner's, and drop it; once an optimizer step, before norm and clipping."""
        if self._replica is not None:
            dist.send(local(self._replica.grad), group=self._group, group_dst=0)
            self._replica.grad = None
        if self._owner is not None:
            gradient = local(self._owner.grad)
            replicas = torch.empty_like(gradient)
            dist.recv(replicas, group=self._group, group_src=self._last)
            gradient.add_(replicas)

    @torch.no_grad()
    def take_values_from_owner(self) -> None:
        """Make the replica equal the owner."""
        if self._owner is not None:
            dist.send(local(self._owner), group=self._group, group_dst=self._last)
        if self._replica is not None:
            dist.recv(local(self._replica), group=self._group, group_src=0)


def leave_replica_to_owner(optimizers: OptimizersContainer) -> None:
    """Take the replica out of this rank's optimizers, before they hold any state."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if (name := f"{_REPLICA}.weight") in group["param_names"]:
                i = group["param_names"].index(name)
                del group["params"][i], group["param_names"][i]


def of_last_stage(value: torch.Tensor, parallel_dims: ParallelDims) -> torch.Tensor:
    """The last stage's number, a tensor of one element, on every stage. A collective: every rank must call it."""
    if not parallel_dims.pp_enabled:
        return value
    group = parallel_dims.get_mesh("pp").get_group()
    value = local(value.detach()).clone().reshape(())
    dist.broadcast(value, group=group, group_src=group.size() - 1)
    return value


def _weight(model_parts: list[nn.Module], name: str) -> nn.Parameter | None:
    modules = [getattr(part, name) for part in model_parts if getattr(part, name) is not None]
    return modules[0].weight if modules else None
