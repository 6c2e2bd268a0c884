"""This module computes parameters, FLOPs and KV cache of a MobileMoE from its dimensions alone, by closed formulas.

A product of an [n, m] matrix and a vector counts as 2 n m FLOPs. Norms, rotations, softmax and activations are left
out, as in the usual estimate 6 N D. Lookups in the embedding count as 0 FLOPs. The output projection, which is tied to
the embedding, is counted.
"""

import math
from dataclasses import dataclass

from core.errors import RefusedInput
from titan_ext.config import ModelDims


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters by kind, over all layers. The tied embedding counts once; the expert bias is a buffer."""

    embedding: int
    attention: int
    router: int
    routed_experts: int
    shared_experts: int
    norms: int
    active_routed_experts: int
    """Number of parameters of the routed experts that one token passes through."""

    @property
    def total(self) -> int:
        """Return the number of all parameters."""
        rest = self.embedding + self.attention + self.router + self.shared_experts + self.norms
        return rest + self.routed_experts

    @property
    def active(self) -> int:
        """Return the number of parameters that one token passes through (N_act in arXiv 2605.27358)."""
        return self.total - self.routed_experts + self.active_routed_experts


def count_parameters(dims: ModelDims) -> ParameterCount:
    """Count the parameters of a model of these dimensions (S 1.3B, M 2.8B, L 5.3B)."""
    d, layers = dims.d_model, dims.n_layers
    q_width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
    expert = 3 * d * dims.expert_hidden
    return ParameterCount(
        embedding=dims.vocab_size * d,
        attention=layers * (2 * d * q_width + 2 * d * kv_width),
        router=layers * dims.n_experts * d,
        routed_experts=layers * dims.n_experts * expert,
        shared_experts=layers * 3 * d * dims.shared_hidden,
        norms=(2 * layers + 1) * d,
        active_routed_experts=layers * dims.top_k * expert,
    )


def split_layers(dims: ModelDims, num_stages: int) -> list[int]:
    """Return the number of layers of each of a pipeline's stages, at least one.

    The last stage also computes the output projection, which costs as much as several layers. It gets so many layers
    fewer that the slowest stage is as fast as possible; the other stages share the rest evenly.

    Raises:
        RefusedInput: there are fewer layers than stages.
    """
    if num_stages > dims.n_layers:
        raise RefusedInput(f"{num_stages} pipeline stages: a model of {dims.n_layers} layers has no layer for each")
    if num_stages == 1:
        return [dims.n_layers]
    count = count_parameters(dims)
    layer_parameters = (count.active - count.embedding) / dims.n_layers
    projection_cost = count.embedding / layer_parameters  # in layers

    def cost_of_slowest_stage(last: int) -> float:
        return max(last + projection_cost, math.ceil((dims.n_layers - last) / (num_stages - 1)))

    last = min(range(1, dims.n_layers - num_stages + 2), key=cost_of_slowest_stage)
    each, more = divmod(dims.n_layers - last, num_stages - 1)
    return [each + (i < more) for i in range(num_stages - 1)] + [last]


def inference_flops_per_token(dims: ModelDims, context: int) -> int:
    """Return the FLOPs of the forward pass of one token that attends to `context` positions.

    The result is 2 FLOPs per active parameter, norms left out, plus the FLOPs of attention.
    """
    count = count_parameters(dims)
    attention = 4 * dims.n_layers * dims.n_heads * dims.head_dim * context
    return 2 * (count.active - count.norms) + attention


def training_flops_per_token(dims: ModelDims, seq_len: int) -> int:
    """Return the FLOPs per token of the forward and the backward pass.

    The two passes cost as much as three forward passes. On average a token attends to half of `seq_len`. Recomputed
    activations, dropped tokens and padded tokens are not counted.
    """
    return 3 * inference_flops_per_token(dims, seq_len // 2)


def kv_cache_bytes(dims: ModelDims, context: int, bytes_per_value: float = 2) -> int:
    """Return the bytes of the keys and values of one sequence of `context` tokens.

    A bfloat16 value takes 2 bytes, an INT8 value takes 1.
    """
    return int(2 * dims.n_layers * dims.n_kv_heads * dims.head_dim * context * bytes_per_value)
