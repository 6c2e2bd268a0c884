"""The MoE layer's parts that differ from torchtitan's: a float32 router gate with z-loss, experts in any dtype.

Shape suffixes: B batch, L sequence, D model dimension, E experts, F expert hidden width, R tokens routed to the local
experts.
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts

from titan_ext.cpu import adaptations
from titan_ext.dtensor import local
from titan_ext.mobilemoe.router_z_loss import attach_router_z_loss


class RouterGate(Linear):
    """The router's linear map in float32 whatever the activations' dtype, with the z-loss attached in training."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        z_loss_coefficient: float = 0.0
        num_tokens_per_step: int = 0
        """Tokens of one optimizer step over all ranks; set from the training config before the model is built."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.z_loss_coefficient = config.z_loss_coefficient
        self.num_tokens_per_step = config.num_tokens_per_step
        # This rank's tokens since the metrics were last read and their sums of logsumexp^2 and of the entropy of the
        # router's choice; activation recomputation counts tokens twice, which leaves the means as they are.
        self.register_buffer("token_sums", torch.zeros(3, dtype=torch.float32), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        logits_BLE = F.linear(input.float(), self.weight.float())
        if self.training:
            self._count(logits_BLE.detach())
            if self.z_loss_coefficient > 0:
                assert self.num_tokens_per_step > 0, "update_from_config sets num_tokens_per_step before it is built"
                logits_BLE = attach_router_z_loss(logits_BLE, self.z_loss_coefficient, self.num_tokens_per_step)
        return logits_BLE

    @torch.no_grad()
    def _count(self, logits_BLE: torch.Tensor) -> None:
        with spmd.no_typecheck():  # sums over this rank's tokens, reduced when metrics are read
            self._add_to_sums(local(logits_BLE))

    def _add_to_sums(self, logits_BLE: torch.Tensor) -> None:
        scores_BLE = torch.sigmoid(logits_BLE)
        share_BLE = scores_BLE / scores_BLE.sum(dim=-1, keepdim=True)
        entropy = -torch.xlogy(share_BLE, share_BLE).sum()
        z_squares = torch.logsumexp(logits_BLE, dim=-1).square().sum()
        num_tokens = torch.full_like(entropy, logits_BLE.shape[:-1].numel())
        local(self.token_sums).add_(torch.stack([num_tokens, z_squares, entropy]))

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.token_sums = torch.zeros(3, dtype=torch.float32, device=buffer_device or self.token_sums.device)


class Experts(GroupedExperts):
    """Routed SwiGLU experts as one grouped GEMM a matrix, in the dtype of the activations.

    torchtitan's GroupedExperts computes in bfloat16 only; float32 is needed to compare against references on the CPU.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def local_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [e, F, D], down [e, D, F] and up [e, F, D] weights of this rank's e experts as plain tensors."""
        return tuple(local(w) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows x [R, D] or [R, F] as the grouped products take them; quantization overrides it."""
        return x

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        w1_EFD, w2_EDF, w3_EFD = (w.to(x_RD.dtype) for w in self.local_weights())
        if (
            adaptations.IS_CPU and not torch.compiler.is_compiling() and x_RD.shape[0] == 0
        ):  # one graph cannot branch on rows
            # grouped_mm's backward fails without rows; the weights still need a gradient for FSDP's reduction.
            return x_RD + 0.0 * (w1_EFD.sum() + w2_EDF.sum() + w3_EFD.sum())
        rows_R = None
        if adaptations.IS_CPU and x_RD.dtype == torch.bfloat16:
            x_RD, num_tokens_per_expert_E, rows_R = adaptations.pad_groups(x_RD, num_tokens_per_expert_E)
        offsets_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        x_RD = self.quantize_input(x_RD)
        gate_RF = self._grouped_mm(A=x_RD, B_t=w1_EFD.transpose(-2, -1), offs=offsets_E)
        up_RF = self._grouped_mm(A=x_RD, B_t=w3_EFD.transpose(-2, -1), offs=offsets_E)
        h_RF = self.quantize_input(F.silu(gate_RF) * up_RF)
        out_RD = self._grouped_mm(A=h_RF, B_t=w2_EDF.transpose(-2, -1), offs=offsets_E)
        return out_RD if rows_R is None else out_RD.index_select(0, rows_R)
