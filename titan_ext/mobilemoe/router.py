"""torchtitan's router, whose gradient is written and not added: no two choices of a token share a score.

PyTorch's gradient of `gather` adds, because it does not know that the indices of a row differ. On a GPU that is an
atomic addition for each choice.

Shape suffixes: B batch, L sequence, D model dimension, E experts, K choices a token.
"""

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torchtitan.models.common.moe import TokenChoiceTopKRouter


class Router(TokenChoiceTopKRouter):
    """Chooses K experts a token by score + bias, and weights them by their scores."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        pass

    def forward(
        self, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return routing weights float32 [B, L, K], numbers of the experts int64 [B, L, K], and scores [B, L, E]."""
        _, expert_ids_BLK, scores_BLE = super().forward(x_BLD, expert_bias_E)
        weights_BLK = _SelectScores.apply(scores_BLE, expert_ids_BLK)
        if self.route_norm:
            weights_BLK = weights_BLK / (weights_BLK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_BLK * self.route_scale, expert_ids_BLK, scores_BLE


@spmd.register_local_autograd_function
class _SelectScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_BLE: torch.Tensor, expert_ids_BLK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(expert_ids_BLK)
        ctx.num_experts = scores_BLE.shape[-1]
        return scores_BLE.gather(-1, expert_ids_BLK)

    @staticmethod
    def backward(ctx: Any, grad_BLK: torch.Tensor) -> tuple[torch.Tensor, None]:
        (expert_ids_BLK,) = ctx.saved_tensors
        zeros_BLE = grad_BLK.new_zeros(*grad_BLK.shape[:-1], ctx.num_experts)
        return zeros_BLE.scatter(-1, expert_ids_BLK, grad_BLK), None
