"""The parts of the MoE layer that differ from torchtitan's: a float32 router gate with z-loss, experts in any dtype.

The rest of the layer is torchtitan's: `MoE`, `RoutedExperts`, and the router but for its gradient
(`titan_ext.mobilemoe.router`), in torchtitan/models/common/moe.py, put together in `titan_ext.mobilemoe.build_config`.
The expert bias is updated in `titan_ext.mobilemoe.expert_bias`.

Shape suffixes: B batch, L sequence, D model dimension, E experts, F expert hidden width, R tokens routed to the local
experts.
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts

from titan_ext.compat import multiply_grouped
from titan_ext.cpu.device import IS_CPU
from titan_ext.cpu.kernels import pad_groups
from titan_ext.dtensor import local
from titan_ext.mobilemoe.router_z_loss import attach_router_z_loss


class RouterGate(Linear):
    """The router's linear map, in float32 for activations of any dtype. In training it attaches the z-loss.

    A rounding error of bfloat16 would change the choice of experts where two scores are close.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        z_loss_coefficient: float = 0.0
        """Weight of the router z-loss; 0 turns it off."""
        num_tokens_per_step: int = 0
        """Number of tokens of one optimizer step over all ranks; set from the training config before the model is
        built."""
        num_copies: int = 1
        """Number of ranks that route the same tokens and whose gradients of the weight are added up; set with it."""

    token_sums: torch.Tensor

    def __init__(self, config: Config):
        super().__init__(config)
        self.z_loss_coefficient = config.z_loss_coefficient
        self.num_tokens_per_step = config.num_tokens_per_step
        self.num_copies = config.num_copies
        # Sums over this rank's tokens since the metrics were last read: 1 (their number), logsumexp(logits)^2, and the
        # entropy of the normalised scores in nats. Activation recomputation counts every token twice, in all three
        # sums, so the means stay the same.
        self.register_buffer("token_sums", torch.zeros(3, dtype=torch.float32), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the router's logits, float32 [B, L, E], for `input` [B, L, D]."""
        logits_BLE = F.linear(input.float(), self.weight.float())
        if self.training:
            self._record(logits_BLE.detach())
            if self.z_loss_coefficient > 0:
                assert self.num_tokens_per_step > 0, "MobileMoEModel.Config.update_from_config sets it"
                coefficient = self.z_loss_coefficient / self.num_copies
                logits_BLE = attach_router_z_loss(logits_BLE, coefficient, self.num_tokens_per_step)
        return logits_BLE

    @torch.no_grad()
    def _record(self, logits_BLE: torch.Tensor) -> None:
        # The sums are over one rank's tokens and are reduced only when metrics are read. torchtitan's type checker has
        # no type for that, so it is off here.
        with spmd.no_typecheck():
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
    """The routed SwiGLU experts: one grouped matrix product for each of w1, w3 and w2, in the activations' dtype.

    torchtitan's GroupedExperts computes in bfloat16 only. The tests compare with references in float32.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def local_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the weights of this rank's e experts as plain tensors: gate and up [e, F, D], down [e, D, F].

        Their order is gate (w1), down (w2), up (w3).
        """
        return local(self.w1_EFD), local(self.w2_EDF), local(self.w3_EFD)

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows that are multiplied with the weights, for rows x [R, D] or [R, F].

        Without quantization these are the rows themselves; `titan_ext.quantization.qat` overrides the method.
        """
        return x

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Return the experts' outputs [R, D].

        Args:
            x_RD: rows sorted by expert.
            num_tokens_per_expert_E: int64, number of rows of each expert of this rank.
        """
        w1_EFD, w2_EDF, w3_EFD = (w.to(x_RD.dtype) for w in self.local_weights())
        if IS_CPU and not torch.compiler.is_compiling() and x_RD.shape[0] == 0:  # one graph cannot branch on rows
            # grouped_mm's backward fails without rows; the weights still need a gradient for FSDP's reduction.
            return x_RD + 0.0 * (w1_EFD.sum() + w2_EDF.sum() + w3_EFD.sum())
        # oneDNN prepares its kernels anew for every number of rows, and an expert hardly ever gets the same number
        # twice. `pad_groups` adds rows of zeros, which are left out again below.
        rows_R = None
        if IS_CPU and x_RD.dtype == torch.bfloat16:
            x_RD, num_tokens_per_expert_E, rows_R = pad_groups(x_RD, num_tokens_per_expert_E)
        offsets_E = torch.cumsum(num_tokens_per_expert_E, dim=0).to(torch.int32)
        x_RD = self.quantize_input(x_RD)
        gate_RF = multiply_grouped(self, x_RD, w1_EFD.transpose(-2, -1), offsets_E)
        up_RF = multiply_grouped(self, x_RD, w3_EFD.transpose(-2, -1), offsets_E)
        h_RF = self.quantize_input(F.silu(gate_RF) * up_RF)
        out_RD = multiply_grouped(self, h_RF, w2_EDF.transpose(-2, -1), offsets_E)
        return out_RD if rows_R is None else out_RD.index_select(0, rows_R)
