"""This module builds what ExecuTorch traces: its example Llama transformer, filled with INT4 values and scales.

ExecuTorch's `llama_transformer` can be a MobileMoE or a dense Llama. It is built on the meta device. Then every matrix
is read once and put in as values and scales. So memory holds only the quantized model, and the program holds the
numbers of the INT4 folder bit for bit.

Shape suffixes: B batch, L sequence, T tokens, D model width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from eval.compat import (
    build_llama,
    int4_embedding,
    int4_linear_weight,
    register_executorch_ops,
    use_custom_attention,
)
from eval.device.expert_blobs import pack_blobs, pack_stock_blobs
from eval.device.expert_op.matrix_ops import PackedEmbedding, PackedLinear, SharedMatrix
from eval.device.weights import DeviceWeights
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from eval.hf_mobilemoe.modeling_mobilemoe import rotary_embedding

ExpertOp = Literal["stock", "fast"]
CacheType = Literal["float32", "int8"]


class FusedMoE(nn.Module):
    """An MoE layer whose router and routed experts are one op; the shared expert is a module beside it."""

    def __init__(
        self,
        router_ED: torch.Tensor,
        bias_E: torch.Tensor,
        packed_w13: torch.Tensor,
        packed_w2: torch.Tensor,
        shared_expert: nn.Module,
        *,
        config: MobileMoEConfig,
        group_size: int,
        expert_op: ExpertOp,
    ):
        super().__init__()
        self.router_ED: torch.Tensor
        self.bias_E: torch.Tensor
        self.packed_w13: torch.Tensor
        self.packed_w2: torch.Tensor
        self.register_buffer("router_ED", router_ED)
        self.register_buffer("bias_E", bias_E)
        self.register_buffer("packed_w13", packed_w13)
        self.register_buffer("packed_w2", packed_w2)
        self.shared_expert = shared_expert
        namespace = torch.ops.llama if expert_op == "stock" else torch.ops.mobilemoe
        self.op: Callable[..., torch.Tensor] = namespace.quantized_moe_ffn
        self.sizes = (
            config.num_experts_per_tok, config.num_local_experts, config.intermediate_size, config.hidden_size,
            group_size, 4, "sigmoid", config.routed_scaling_factor,
        )  # fmt: skip

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        y_TD = self.op(x_TD, self.router_ED, self.bias_E, self.packed_w13, self.packed_w2, *self.sizes)
        return (y_TD + self.shared_expert(x_TD)).view(x_BLD.shape)


def moe_transformer(
    weights: DeviceWeights, context: int, expert_op: ExpertOp, kv_cache: CacheType = "float32"
) -> nn.Module:
    """Build the MobileMoE of `weights` with a KV cache of `context` positions, ready to export.

    Returns:
        A module that takes (tokens [1, T], {"input_pos": [1]}), both int64, and returns the float32 logits
        [1, vocab_size] of the last token.
    """
    register_executorch_ops()  # the layers hold a reference to the stock op
    config = weights.config
    model: Any = build_llama(
        dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps, hidden_dim=config.intermediate_size_mlp, moe=True,
        num_experts=config.num_local_experts, num_activated_experts=config.num_experts_per_tok,
        moe_hidden_dim=config.intermediate_size, moe_shared_expert_hidden_dim=config.intermediate_size_mlp,
        moe_use_expert_bias=True, moe_score_func="sigmoid", moe_route_scale=config.routed_scaling_factor,
        use_qk_norm=True, qk_norm_affine=False, qk_norm_before_rope=False, max_seq_len=context, max_context_len=context,
        use_kv_cache=True, enable_dynamic_shape=True,
    )  # fmt: skip
    rotary = rotary_embedding(config, torch.arange(context)[None])[0]
    model.rope.freqs_cos, model.rope.freqs_sin = rotary.real.contiguous(), rotary.imag.contiguous()
    # The embedding is also the output projection. Our ops read both out of one packed matrix.
    embedding = weights.read_matrix("model.embed_tokens.weight")
    if expert_op == "fast":
        shared = SharedMatrix(*embedding)
        model.tok_embeddings, model.output = PackedEmbedding(shared), PackedLinear(shared)
    else:
        model.tok_embeddings = _embedding(*embedding)
        model.output.weight = _frozen(int4_linear_weight(*embedding))
    model.norm.weight = _frozen(weights.read_unquantized("model.norm.weight"))
    for i, layer in enumerate(model.layers):
        _fill_layer(layer, f"model.layers.{i}.", weights, expert_op)
    return use_custom_attention(model, int8_cache=kv_cache == "int8")


def _fill_layer(layer: Any, prefix: str, weights: DeviceWeights, expert_op: ExpertOp) -> None:
    for p in "qkvo":
        linear = getattr(layer.attention, f"w{p}")
        linear.weight = _frozen(int4_linear_weight(*weights.read_matrix(f"{prefix}self_attn.{p}_proj.weight")))
    layer.attention_norm.weight = _frozen(weights.read_unquantized(f"{prefix}input_layernorm.weight"))
    layer.ffn_norm.weight = _frozen(weights.read_unquantized(f"{prefix}post_attention_layernorm.weight"))
    shared = layer.block_sparse_moe.shared_expert
    for name, p in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        linear = getattr(shared, name)
        matrix = weights.read_matrix(f"{prefix}feed_forward.shared_expert.{p}_proj.weight")
        linear.weight = _frozen(int4_linear_weight(*matrix))
    experts = f"{prefix}feed_forward.experts."
    pack = pack_stock_blobs if expert_op == "stock" else pack_blobs
    layer.block_sparse_moe = FusedMoE(
        weights.read_unquantized(f"{prefix}feed_forward.router.weight"),
        weights.read_unquantized(f"{prefix}feed_forward.expert_bias"),
        pack(*weights.read_expert_matrices(f"{experts}gate_up_proj")),
        pack(*weights.read_expert_matrices(f"{experts}down_proj")),
        shared,
        config=weights.config,
        group_size=weights.expert_group_size,
        expert_op=expert_op,
    )


@dataclass(frozen=True)
class DenseDims:
    """Dimensions of a dense Llama for comparison; its weights are random."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden: int
    vocab_size: int
    head_dim: int = 64


def dense_transformer(dims: DenseDims, context: int, seed: int = 0) -> nn.Module:
    """Build a dense model with random INT4 weights for the same export as a MobileMoE.

    `context` and the returned module are those of `moe_transformer`. `seed` seeds the weights.
    """
    model = build_llama(
        dim=dims.d_model, n_layers=dims.n_layers, n_heads=dims.n_heads, n_kv_heads=dims.n_kv_heads,
        head_dim=dims.head_dim, vocab_size=dims.vocab_size, hidden_dim=dims.hidden, rope_theta=500_000.0,
        max_seq_len=context, max_context_len=context, use_kv_cache=True, enable_dynamic_shape=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random_matrix(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
        return q, torch.full((shape[0], shape[1] // 32), 2.0**-8, dtype=torch.float16)

    embedding = random_matrix((dims.vocab_size, dims.d_model))
    model.tok_embeddings = _embedding(*embedding)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            matrix = embedding if name == "output" else random_matrix(tuple(module.weight.shape))
            module.weight = _frozen(int4_linear_weight(*matrix))
        elif name.endswith("norm"):
            module.weight = _frozen(torch.ones(dims.d_model))
    return use_custom_attention(model)


def count_weight_bytes(model: nn.Module) -> dict[str, int]:
    """Count the bytes of weights that a token's forward pass reads.

    An INT4 linear counts half a byte for each weight, and its bfloat16 scales. The embedding table is left out, because
    a token reads only one row of it. The output projection counts in full.

    Returns:
        dense_bytes (everything outside the routed experts), expert_bytes (one expert of one layer), experts_a_token.
    """
    dense = expert = top_k = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight: Any = module.weight  # torchao's tensor of INT4 values and scales
            dense += weight.qdata.numel() // 2 + 2 * weight.scale.numel()
        elif isinstance(module, PackedLinear):
            dense += module.packed.nbytes
        elif isinstance(module, FusedMoE):
            dense += module.router_ED.nbytes + module.bias_E.nbytes
            expert = (module.packed_w13.nbytes + module.packed_w2.nbytes) // len(module.bias_E)
            top_k = module.sizes[0]
    named: list[tuple[str, Any]] = list(model.named_modules())
    dense += sum(4 * norm.weight.numel() for name, norm in named if name.endswith("norm"))
    return {"dense_bytes": dense, "expert_bytes": expert, "experts_a_token": top_k}


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _embedding(q: torch.Tensor, scale: torch.Tensor) -> nn.Module:
    """Pack INT4 rows for `embedding_4bit`: two values a byte, the high nibble first, each stored plus 8."""
    width, n_groups = q.shape[1], scale.shape[1]
    even, odd = (q + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    scales = scale.squeeze(1) if n_groups == 1 else scale
    return int4_embedding((even << 4) | odd, scales, width, width // n_groups)
