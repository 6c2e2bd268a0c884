"""Makes torchtitan configs from dimensions: `model_config` for the model, `model_spec` for a Trainer.

Initial weights are normal with std 0.02. Projections into the residual stream (`wo`, the experts' `w2`) are scaled by
1 / sqrt(2 * layers), as torchtitan's Qwen3 does. The paper (arXiv 2605.27358) does not state its initialisation.
"""

import torch.nn as nn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.common import Embedding, Linear
from torchtitan.models.common.attention import QKVLinear
from torchtitan.models.common.config_utils import get_attention_config
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE, RoutedExperts
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.protocols.module import Module

from titan_ext.config import ModelDims
from titan_ext.cpu.device import IS_CPU
from titan_ext.cpu.init import normal_init
from titan_ext.mobilemoe.attention import Attention, DocumentAttention
from titan_ext.mobilemoe.capacity_dispatch import CapacityRoutedExperts, CapacityTokenDispatcher
from titan_ext.mobilemoe.expert_bias import register_expert_bias_update
from titan_ext.mobilemoe.load_metrics import register_load_recording_hook
from titan_ext.mobilemoe.model import MobileMoEBlock, MobileMoEModel
from titan_ext.mobilemoe.moe import Experts, RouterGate
from titan_ext.mobilemoe.parallelize import parallelize_mobilemoe
from titan_ext.mobilemoe.rope import InterleavedRoPE
from titan_ext.mobilemoe.router import Router
from titan_ext.mobilemoe.state_dict_adapter import MobileMoEStateDictAdapter
from titan_ext.mobilemoe.tied_embedding_pp import exclude_tied_replica
from titan_ext.mobilemoe.token_dispatch import TokenDispatcher
from titan_ext.training.optimizers import SkippableOptimizers

_INIT_STD = 0.02
_INIT = {"weight": normal_init(_INIT_STD)}


def model_config(
    dims: ModelDims,
    *,
    z_loss_coefficient: float = 0.0,
    expert_bias_update_rate: float = 1e-3,
    capacity_factor: float | None = None,
    attention_backend: str | None = None,
) -> MobileMoEModel.Config:
    """Return the torchtitan config of a model with these dimensions.

    Args:
        dims: dimensions; `titan_ext.config.FLAVORS` has the published ones.
        z_loss_coefficient: weight of the router z-loss (`titan_ext.mobilemoe.router_z_loss`); 0 turns it off.
        expert_bias_update_rate: step of the aux-loss-free load balancing (`titan_ext.mobilemoe.expert_bias`), above 0.
        capacity_factor: room of an expert in training, in multiples of its share of perfectly balanced tokens
            (`titan_ext.mobilemoe.capacity_dispatch`); None drops no token.
        attention_backend: "flex" or "varlen" on a GPU; None takes flex there, and `DocumentAttention` on the CPU.
    """
    residual_std = _INIT_STD / (2 * dims.n_layers) ** 0.5
    residual_init = {"weight": normal_init(residual_std)}

    def norm() -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=dims.d_model, eps=dims.norm_eps, param_init={"weight": nn.init.ones_})

    layers = [
        MobileMoEBlock.Config(
            attention_norm=norm(),
            ffn_norm=norm(),
            attention=_attention_config(dims, _choose_inner_attention(attention_backend), residual_init),
            moe=_moe_config(dims, z_loss_coefficient, expert_bias_update_rate, capacity_factor, residual_init),
        )
        for _ in range(dims.n_layers)
    ]
    return MobileMoEModel.Config(
        dim=dims.d_model,
        vocab_size=dims.vocab_size,
        enable_weight_tying=True,
        tok_embeddings=Embedding.Config(
            num_embeddings=dims.vocab_size, embedding_dim=dims.d_model, param_init={"weight": skip_param_init}
        ),
        norm=norm(),
        lm_head=Linear.Config(in_features=dims.d_model, out_features=dims.vocab_size, param_init=_INIT),
        layers=layers,
    )


def model_spec(config: MobileMoEModel.Config, flavor: str) -> ModelSpec:
    """Return what a torchtitan Trainer.Config takes as its `model_spec`: the config and the functions of the model.

    Args:
        config: the model, from `model_config`.
        flavor: name of the dimensions, for torchtitan's log.
    """
    return ModelSpec(
        name="mobilemoe",
        flavor=flavor,
        model=config,
        parallelize_fn=parallelize_mobilemoe,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=_register_optimizer_hooks,
        state_dict_adapter=MobileMoEStateDictAdapter,
    )


def _register_optimizer_hooks(
    optimizers: SkippableOptimizers, model_parts: list[nn.Module], parallel_dims: ParallelDims
) -> None:
    if parallel_dims.pp_enabled:
        exclude_tied_replica(optimizers)
    # torchtitan runs the hooks in the order of registration. Recording comes first, because the update of the expert
    # bias sets the counts to zero after it has used them.
    register_load_recording_hook(optimizers, model_parts)
    register_expert_bias_update(optimizers, model_parts, parallel_dims)


def _choose_inner_attention(backend: str | None) -> Module.Config:
    if backend is None and IS_CPU:
        return DocumentAttention.Config()
    return get_attention_config(backend or "flex")


def _attention_config(dims: ModelDims, inner_attention: Module.Config, residual_init: dict) -> Attention.Config:
    q_width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
    scaling = dims.rope_scaling
    return Attention.Config(
        dim=dims.d_model,
        n_heads=dims.n_heads,
        n_kv_heads=dims.n_kv_heads,
        head_dim=dims.head_dim,
        norm_eps=dims.norm_eps,
        qkv_linear=QKVLinear.Config(
            head_dim=dims.head_dim,
            wq=Linear.Config(in_features=dims.d_model, out_features=q_width, param_init=_INIT),
            wkv=Linear.Config(in_features=dims.d_model, out_features=kv_width, param_init=_INIT),
        ),
        wo=Linear.Config(in_features=q_width, out_features=dims.d_model, param_init=residual_init),
        inner_attention=inner_attention,
        rope=InterleavedRoPE.Config(
            dim=dims.head_dim,
            max_seq_len=dims.max_seq_len,
            theta=dims.rope_theta,
            scaling="llama",
            scaling_factor=scaling.factor,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
        ),
    )


def _moe_config(
    dims: ModelDims,
    z_loss_coefficient: float,
    expert_bias_update_rate: float,
    capacity_factor: float | None,
    residual_init: dict,
) -> MoE.Config:
    experts = Experts.Config(
        dim=dims.d_model,
        hidden_dim=dims.expert_hidden,
        num_experts=dims.n_experts,
        param_init={"w1_EFD": _INIT["weight"], "w3_EFD": _INIT["weight"], "w2_EDF": residual_init["weight"]},
    )
    return MoE.Config(
        num_experts=dims.n_experts,
        load_balance_coeff=expert_bias_update_rate,
        router=Router.Config(
            num_experts=dims.n_experts,
            gate=RouterGate.Config(
                in_features=dims.d_model,
                out_features=dims.n_experts,
                param_init=_INIT,
                z_loss_coefficient=z_loss_coefficient,
            ),
            top_k=dims.top_k,
            score_func="sigmoid",
            route_norm=True,
            route_scale=dims.route_scale,
        ),
        routed_experts=_routed_experts_config(dims, experts, capacity_factor),
        shared_experts=_shared_expert_config(dims, residual_init) if dims.shared_hidden else None,
    )


def _shared_expert_config(dims: ModelDims, residual_init: dict) -> FeedForward.Config:
    return FeedForward.Config(
        w1=Linear.Config(in_features=dims.d_model, out_features=dims.shared_hidden, param_init=_INIT),
        w2=Linear.Config(in_features=dims.shared_hidden, out_features=dims.d_model, param_init=residual_init),
        w3=Linear.Config(in_features=dims.d_model, out_features=dims.shared_hidden, param_init=_INIT),
    )


def _routed_experts_config(
    dims: ModelDims, experts: Experts.Config, capacity_factor: float | None
) -> RoutedExperts.Config:
    if capacity_factor is None:
        dropless = TokenDispatcher.Config(num_experts=dims.n_experts, top_k=dims.top_k)
        return RoutedExperts.Config(inner_experts=experts, token_dispatcher=dropless)
    dispatcher = CapacityTokenDispatcher.Config(
        num_experts=dims.n_experts, top_k=dims.top_k, capacity_factor=capacity_factor
    )
    return CapacityRoutedExperts.Config(inner_experts=experts, token_dispatcher=dispatcher)
