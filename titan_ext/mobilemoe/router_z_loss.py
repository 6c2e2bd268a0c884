"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), which torchtitan 0.3.0 does not have.

    L_z = coefficient * mean over tokens of logsumexp_e(logits)^2,  summed over the MoE layers.

It keeps the router's logits small. It enters as a gradient on the logits, so the trainer's loss stays the cross entropy
alone and the term needs no path through the model's outputs.
"""

import spmd_types as spmd
import torch


@spmd.register_local_autograd_function
class _AddZLossGradient(torch.autograd.Function):
    """Identity on the logits; backward adds the gradient of scale * sum over tokens of logsumexp^2."""

    @staticmethod
    def forward(ctx, logits_BLE: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(logits_BLE)
        ctx.scale = scale
        return logits_BLE.view_as(logits_BLE)

    @staticmethod
    def backward(ctx, grad_BLE: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits_BLE,) = ctx.saved_tensors
        z_BL1 = torch.logsumexp(logits_BLE, dim=-1, keepdim=True)
        return grad_BLE + 2 * ctx.scale * z_BL1 * torch.softmax(logits_BLE, dim=-1), None


def attach_router_z_loss(logits_BLE: torch.Tensor, coefficient: float, num_tokens: int) -> torch.Tensor:
    """The router logits of one layer and micro-batch, unchanged in value, with the z-loss in their gradient.

    Args:
        logits_BLE: float32 router logits.
        coefficient: weight of the loss (1e-4 in MobileMoE).
        num_tokens: tokens of the whole optimizer step over all ranks and micro-batches; gradients are summed over
            those (never averaged), so dividing by it makes the mean over the global batch.
    """
    return _AddZLossGradient.apply(logits_BLE, coefficient / num_tokens)
