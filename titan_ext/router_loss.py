"""Router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), which torchtitan 0.3.0 does not have.

    L_z = coefficient * mean over tokens of logsumexp_e(logits)^2,  summed over the MoE layers.

It keeps the router's logits small. It enters the graph as a gradient on the logits, so the trainer's loss stays the
cross entropy alone and the term needs no path through the model's outputs.
"""

import torch


class _AttachLoss(torch.autograd.Function):
    """Identity on `x`; in backward `loss` gets the gradient 1, as if it had been added to the total loss."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_x, torch.ones((), dtype=torch.float32, device=grad_x.device)


def attach_router_z_loss(
    logits_BLE: torch.Tensor, coefficient: float, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attach the z-loss of one layer and micro-batch to its router logits.

    Args:
        logits_BLE: float32 router logits.
        coefficient: weight of the loss (1e-4 in the paper).
        num_tokens: tokens of the whole optimizer step over all ranks and micro-batches; gradients are summed over
            those (never averaged), so dividing by it makes the mean over the global batch.

    Returns:
        The logits, unchanged in value, and the sum of logsumexp^2 over this micro-batch (detached, for metrics).
    """
    z_sum = torch.logsumexp(logits_BLE, dim=-1).square().sum()
    return _AttachLoss.apply(logits_BLE, z_sum * (coefficient / num_tokens)), z_sum.detach()
