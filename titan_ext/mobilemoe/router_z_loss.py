"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), which torchtitan 0.3.0 does not have.

    L_z = coefficient * mean over tokens of logsumexp_e(logits)^2,  summed over the MoE layers.

It keeps the router's logits small. The loss is not computed as a number and added to the cross entropy. Instead its
gradient is added to the logits' gradient in the backward pass. The trainer takes the cross entropy from the model's
output and has no input for a second loss, and under pipeline parallelism the layers' losses would have to travel
through the stages. The logged loss therefore is the cross entropy alone; `router_z` in the metrics has the mean.

Shape suffixes: B batch, L sequence, E experts.
"""

from typing import Any

import spmd_types as spmd
import torch


@spmd.register_local_autograd_function
class _AddZLossGradient(torch.autograd.Function):
    """Returns the logits unchanged; backward adds the gradient of scale * sum over tokens of logsumexp^2."""

    @staticmethod
    def forward(ctx: Any, logits_BLE: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(logits_BLE)
        ctx.scale = scale
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx: Any, grad_BLE: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits_BLE,) = ctx.saved_tensors
        # d/dlogits of z^2 with z = logsumexp(logits) is 2 z softmax(logits).
        z_BL1 = torch.logsumexp(logits_BLE, dim=-1, keepdim=True)
        return grad_BLE + 2 * ctx.scale * z_BL1 * torch.softmax(logits_BLE, dim=-1), None


def attach_router_z_loss(logits_BLE: torch.Tensor, coefficient: float, num_tokens: int) -> torch.Tensor:
    """Return the router logits of one layer and micro-batch unchanged, with the z-loss in their gradient.

    Args:
        logits_BLE: float32 router logits.
        coefficient: weight of the loss (1e-4 in MobileMoE).
        num_tokens: number of tokens of the optimizer step, over all ranks and micro-batches. torchtitan sums the
            gradients of those and does not average them, so the division by it gives the mean over the global batch.
    """
    return _AddZLossGradient.apply(logits_BLE, coefficient / num_tokens)
