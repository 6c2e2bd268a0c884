"""Lays out MobileMoE's parameters and activations over the tensor- and expert-parallel axes of the mesh."""

from typing import Any

import spmd_types as spmd
from torchtitan.models.common.decoder_sharding import (
    norm_config,
    set_decoder_sharding_config,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.models.common.moe_sharding import set_moe_sharding_config

# Without expert parallelism, tensor parallelism splits the experts' hidden dimension.
_EXPERT_TP_LAYOUT = {"w1_EFD": spmd.S(1), "w2_EDF": spmd.S(2), "w3_EFD": spmd.S(1)}


def set_mobilemoe_sharding_config(config: Any, *, enable_sp: bool, enable_ep: bool) -> None:
    """Set `sharding_config` in every sub-config of a `MobileMoEModel.Config`.

    torchtitan ignores the axes that the run does not use.

    Args:
        config: the `MobileMoEModel.Config`, changed in place.
        enable_sp: split the sequence between the layers over the tensor-parallel ranks (sequence parallelism).
        enable_ep: distribute the experts over ranks (expert parallelism).
    """
    set_decoder_sharding_config(config, enable_sp=enable_sp)
    for layer in config.layers:
        layer.attention_norm.sharding_config = norm_config(enable_sp=enable_sp)
        layer.ffn_norm.sharding_config = norm_config(enable_sp=enable_sp)
        set_gqa_attention_sharding(layer.attention, enable_sp=enable_sp)
        set_gqa_inner_attention_local_map(layer.attention.inner_attention)
        set_moe_sharding_config(
            layer.moe, enable_ep=enable_ep, enable_sp=enable_sp, expert_param_layout=_EXPERT_TP_LAYOUT
        )
        # Our buffers are sums over one rank's tokens, as torchtitan's tokens_per_expert_E is.
        counts = layer.moe.sharding_config.state_shardings["tokens_per_expert_E"]
        layer.moe.router.gate.sharding_config.state_shardings["token_sums"] = counts
        layer.moe.routed_experts.sharding_config.state_shardings["num_dropped"] = counts
