"""Convert between a model's dimensions and INT4 groups and the form in which config.json states them."""

from dataclasses import asdict, fields
from typing import Any

from core.errors import refuse_value_errors
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig, describe_quantization
from titan_ext.config import ModelDims, RopeScaling
from titan_ext.quantization.config import QuantizationConfig


def config_from_dims(dims: ModelDims, **extra: Any) -> MobileMoEConfig:
    """Return the transformers config of a model of these dimensions; `extra` are further keys or other values."""
    keys: dict[str, Any] = {
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.d_model,
        "intermediate_size": dims.expert_hidden,
        "intermediate_size_mlp": dims.shared_hidden,
        "num_hidden_layers": dims.n_layers,
        "num_attention_heads": dims.n_heads,
        "num_key_value_heads": dims.n_kv_heads,
        "head_dim": dims.head_dim,
        "max_position_embeddings": dims.max_seq_len,
        "rms_norm_eps": dims.norm_eps,
        "rope_theta": dims.rope_theta,
        "rope_scaling": {"rope_type": "llama3"} | asdict(dims.rope_scaling),
        "num_local_experts": dims.n_experts,
        "num_experts_per_tok": dims.top_k,
        "routed_scaling_factor": dims.route_scale,
    }
    return MobileMoEConfig(**keys | extra)


def dims_from_config(config: MobileMoEConfig) -> ModelDims:
    """Return the dimensions that a config.json describes: the inverse of `config_from_dims`.

    A config without RoPE scaling becomes llama3's scaling by a factor of 1, which is the same.
    """
    scaling = config.rope_scaling or {"factor": 1.0}
    known = {field.name for field in fields(RopeScaling)}
    return ModelDims(
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        expert_hidden=config.intermediate_size,
        shared_hidden=config.intermediate_size_mlp,
        n_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        vocab_size=config.vocab_size,
        max_seq_len=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling=RopeScaling(**{key: value for key, value in scaling.items() if key in known}),
        norm_eps=config.rms_norm_eps,
        route_scale=config.routed_scaling_factor,
    )


def int4_layout(quantization: QuantizationConfig) -> dict[str, Any]:
    """Return config.json's `quantization` of an INT4 folder with these groups.

    Raises:
        RefusedInput: `expert_group_axis` names no axis.
    """
    with refuse_value_errors():
        return describe_quantization(
            quantization.group_size, quantization.expert_group_axis, quantization.expert_group_size
        )


def with_layout(config: MobileMoEConfig, layout: dict[str, Any] | None) -> MobileMoEConfig:
    """Return a copy of `config` that describes a checkpoint of this INT4 layout (None: not quantized)."""
    with refuse_value_errors():
        return MobileMoEConfig.from_dict(config.to_dict() | {"quantization": layout})
