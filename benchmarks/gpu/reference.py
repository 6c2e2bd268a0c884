"""MobileMoE's training loss in float64 and plain PyTorch, for any dispatch and with QAT, written from its description.

Sources are arXiv 2605.27358, and the documentation of drop-and-pad and of the two quantizers. No code under test is
used. It is fast enough for two layers of S width. tests/titan_ext/reference.py has the same model token by token.

Letters: T tokens, D model dimension, N heads, K heads of keys and values, H head dimension, E experts, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from titan_ext.config import ModelDims

EXPERTS = "moe.routed_experts.inner_experts."


@dataclass(frozen=True)
class Options:
    """Beside weights and dimensions, these values decide the loss."""

    capacity_factor: float | None
    quantize: bool
    group_size: int
    router_z_loss: float
    computed: torch.dtype
    """Dtype to which training rounds the weights before it computes; the router's weights stay as they are."""


class Reference:
    """This model computes its loss from weights that it is given.

    Attributes:
        loads: after `compute_loss`, the tokens that chose each expert, a list of E numbers for each layer.
    """

    def __init__(self, weights: dict[str, torch.Tensor], dims: ModelDims, options: Options):
        """Take the weights by torchtitan's name: leaves that get gradients, and the expert bias where there is one."""
        self.weights, self.dims, self.options = weights, dims, options
        self.loads: list[list[int]] = []

    def compute_loss(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, labels_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean cross entropy, and the sum that training differentiates: with the router's z-loss."""
        entropy, z_squares = self.compute_sums(tokens_BL, positions_BL, labels_BL)
        entropy = entropy / (labels_BL != -100).sum()
        return entropy, entropy + self.options.router_z_loss * z_squares / tokens_BL.numel()

    def compute_sums(
        self, tokens_BL: torch.Tensor, positions_BL: torch.Tensor, labels_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the cross entropy over the targets, and of the router's squared logsumexp over tokens and
        layers.
        """
        self.loads, self._z_squares = [], torch.zeros((), dtype=torch.float64)
        self._shape, positions_T = tokens_BL.shape, positions_BL.flatten()
        x_TD = self._quantize_weight(self._weight("tok_embeddings.weight"))[tokens_BL.flatten()]
        for layer in range(self.dims.n_layers):
            prefix = f"layers.{layer}."
            x_TD = x_TD + self._attend(self._normalize(x_TD, prefix + "attention_norm.weight"), prefix, positions_T)
            x_TD = x_TD + self._mix_experts(self._normalize(x_TD, prefix + "ffn_norm.weight"), prefix)
        logits_TV = self._multiply(self._normalize(x_TD, "norm.weight"), "tok_embeddings.weight")
        entropy = F.cross_entropy(logits_TV, labels_BL.flatten(), ignore_index=-100, reduction="sum")
        return entropy, self._z_squares

    def _weight(self, name: str) -> torch.Tensor:
        return self.weights[name].to(self.options.computed).double()

    def _normalize(self, x_TD: torch.Tensor, name: str) -> torch.Tensor:
        return x_TD / torch.sqrt(x_TD.pow(2).mean(-1, keepdim=True) + self.dims.norm_eps) * self._weight(name)

    def _multiply(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._quantize_rows(x) @ self._quantize_weight(self._weight(name)).T

    def _attend(self, x_TD: torch.Tensor, prefix: str, positions_T: torch.Tensor) -> torch.Tensor:
        dims, (B, L) = self.dims, self._shape
        kinds = (("wq", dims.n_heads), ("wk", dims.n_kv_heads), ("wv", dims.n_kv_heads))
        q, k, v = (
            self._multiply(x_TD, f"{prefix}attention.qkv_linear.{kind}.weight").view(-1, heads, dims.head_dim)
            for kind, heads in kinds
        )
        q, k = (self._normalize_head(self._rotate(x, positions_T)) for x in (q, k))
        group = dims.n_heads // dims.n_kv_heads
        q, k, v = (x.view(B, L, -1, dims.head_dim).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        document_BL = torch.cumsum(positions_T.view(B, L) == 0, dim=1)
        visible_BLL = (document_BL[:, :, None] == document_BL[:, None]) & torch.ones(L, L, dtype=torch.bool).tril()
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(dims.head_dim)
        scores = scores.masked_fill(~visible_BLL[:, None], -torch.inf)
        out_TD = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B * L, -1)
        return self._multiply(out_TD, f"{prefix}attention.wo.weight")

    def _normalize_head(self, x_TNH: torch.Tensor) -> torch.Tensor:
        return x_TNH / torch.sqrt(x_TNH.pow(2).mean(-1, keepdim=True) + self.dims.norm_eps)

    def _rotate(self, x_TNH: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Rotate neighbouring pairs of a head by the position times the pair's frequency (llama3 scaling)."""
        dims, scaling = self.dims, self.dims.rope_scaling
        frequencies = dims.rope_theta ** (-2 * torch.arange(dims.head_dim // 2, dtype=torch.float64) / dims.head_dim)
        is_long = 2 * math.pi / frequencies > scaling.original_max_position_embeddings / scaling.low_freq_factor
        frequencies = torch.where(is_long, frequencies / scaling.factor, frequencies)
        angles = positions_T[:, None, None] * frequencies
        even, odd = x_TNH[..., 0::2], x_TNH[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(turned, dim=-1).flatten(-2)

    def _mix_experts(self, x_TD: torch.Tensor, prefix: str) -> torch.Tensor:
        dims, options = self.dims, self.options
        logits_TE = x_TD @ self.weights[f"{prefix}moe.router.gate.weight"].double().T
        self._z_squares = self._z_squares + torch.logsumexp(logits_TE, -1).square().sum()
        scores_TE = torch.sigmoid(logits_TE)
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        bias_E = self.weights.get(f"{prefix}moe.expert_bias_E", torch.zeros(dims.n_experts))
        chosen_TE.scatter_(1, (scores_TE + bias_E).topk(dims.top_k).indices, True)
        self.loads.append(chosen_TE.sum(0).tolist())
        weights_TE = scores_TE * chosen_TE
        weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True) * dims.route_scale
        names = (f"{prefix}{EXPERTS}{name}" for name in ("w1_EFD", "w3_EFD", "w2_EDF"))
        gate, up, down = (self._quantize_weight(self._weight(name)) for name in names)
        out_TD = self._feed_forward(x_TD, *(self._shared(prefix, name) for name in ("w1", "w3", "w2")))
        for expert in range(dims.n_experts):
            taken = chosen_TE[:, expert].nonzero().flatten()
            if options.capacity_factor is not None:
                room = math.ceil(options.capacity_factor * len(x_TD) * dims.top_k / dims.n_experts)
                taken = taken[weights_TE[taken, expert].argsort(descending=True)[:room]]
            out = self._feed_forward(x_TD[taken], gate[expert], up[expert], down[expert])
            out_TD = out_TD.index_add(0, taken, weights_TE[taken, expert, None] * out)
        return out_TD

    def _shared(self, prefix: str, name: str) -> torch.Tensor:
        return self._quantize_weight(self._weight(f"{prefix}moe.shared_experts.{name}.weight"))

    def _feed_forward(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        x = self._quantize_rows(x)
        return self._quantize_rows(F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _quantize_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Round groups of the last dimension to INT4, scale max|w| / 7.5 in bfloat16; the gradient passes through."""
        if not self.options.quantize:
            return weight
        dtype = torch.promote_types(self.options.computed, torch.float32)
        groups = weight.detach().to(dtype).unflatten(-1, (-1, self.options.group_size))
        scale = (groups.abs().amax(-1, keepdim=True).double() / 7.5).float().bfloat16().half()
        scale = scale.to(dtype).clamp(min=2.0**-24)
        rounded = ((groups * (1 / scale)).round().clamp(-8, 7) * scale).flatten(-2)
        return weight + (rounded.to(self.options.computed).double() - weight).detach()

    def _quantize_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Round every row to its own 256 levels that hold 0; the gradient passes through."""
        if not self.options.quantize or not len(x):
            return x
        low, high = x.detach().amin(-1, keepdim=True).clamp(max=0), x.detach().amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - (low / scale).round()).clamp(-128, 127)
        rounded = (((x.detach() / scale).round() + zero).clamp(-128, 127) - zero) * scale
        return x + (rounded - x).detach()
