"""The mlx format: a folder for mlx-lm on Apple's machines, with the INT4 groups as MLX's 4-bit groups of 32.

MLX's `exaone_moe` computes what MobileMoE computes, llama3's scaling of rotary positions included, which its `glm4_moe`
leaves out. A 4-bit group of MLX is q * scale + bias with q of 0 to 15: with bias = -8 * scale it holds the INT4 values
bit for bit.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from core.atomic import write_json
from core.errors import RefusedInput
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import dims_from_config, with_layout
from eval.export.glm4_moe import arrange, rename
from eval.export.hf_folder import write_tokenizer
from eval.export.hf_native import MAX_SHARD_BYTES
from eval.export.limits import INT4_BLOCK, explain_mlx_misfit
from eval.export.model_card import MLX, write_model_card
from eval.export.packed_weights import PackedWeights, pack_words, to_bfloat16_blocks
from eval.export.shards import write_shards
from eval.export.source import Source
from eval.export.tensor_layout import TensorLayout, TensorSpec
from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32, tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.quantization.config import QuantizationConfig

MODEL_TYPE = "exaone_moe"
_ROTATED = ("q_proj.weight", "k_proj.weight")
VALUES_PER_WORD = 8
"""Number of 4-bit values in a uint32, the first in the lowest bits."""


def export_mlx(source: Source, out: Path) -> Path:
    """Write the folder of a checkpoint for mlx-lm and return `out`.

    Scales and everything unquantized are bfloat16, and so the model computes in bfloat16; router and expert bias are
    float32.

    Raises:
        RefusedInput: MLX has no such model, the INT4 groups are no blocks of 32 along the input axis, or a scale is
            not exact in bfloat16.
    """
    config = with_layout(source.config, None)
    if reason := explain_mlx_misfit(dims_from_config(config), QuantizationConfig()):
        raise RefusedInput(f"{reason}; export to gguf instead")
    weights = PackedWeights(source)
    weights.check_blocks("--format mlx", "export --format hf-native")
    with new_folder(out, source.tokenizer) as partial:
        write_tokenizer(source.tokenizer, config, partial)
        write_json(partial / "config.json", build_config(config))
        write_model_card(partial, dims_from_config(config), "4-bit folder for mlx-lm", MLX)
        write_shards(convert_tensors(source, weights, config), describe_tensors(config), partial, MAX_SHARD_BYTES)
    return out


def build_config(config: MobileMoEConfig) -> dict[str, Any]:
    """Return the content of config.json."""
    layers = config.num_hidden_layers
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_experts_per_tok", "rms_norm_eps", "max_position_embeddings", "routed_scaling_factor", "norm_topk_prob",
        "rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        "architectures": ["ExaoneMoEForCausalLM"],
        "model_type": MODEL_TYPE,
        **{key: getattr(config, key) for key in same},
        "intermediate_size": config.intermediate_size_mlp,  # of dense layers, which there are none of
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_local_experts,
        "num_shared_experts": config.intermediate_size_mlp // config.intermediate_size,
        "layer_types": ["full_attention"] * layers,
        "is_moe_layer": [True] * layers,
        "sliding_window": config.max_position_embeddings,  # of layers with one, which there are none of
        "quantization": {"group_size": INT4_BLOCK, "bits": 4, "mode": "affine"},
    }


def describe_tensors(config: MobileMoEConfig) -> TensorLayout:
    """Return the tensors of the folder in the order of `convert_tensors`."""
    layout: TensorLayout = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1 or kept_in_float32(name):
            layout[rename(name)] = TensorSpec(torch.float32 if kept_in_float32(name) else torch.bfloat16, shape)
            continue
        for target, part in _name_parts(name):
            rows = shape
            if len(shape) == 3:
                experts, inputs, outputs = shape
                rows = (experts, outputs if part == "down" else outputs // 2, inputs)
            groups = TensorSpec(torch.bfloat16, (*rows[:-1], rows[-1] // INT4_BLOCK))
            layout |= {
                f"{target}.weight": TensorSpec(torch.uint32, (*rows[:-1], rows[-1] // VALUES_PER_WORD)),
                f"{target}.scales": groups,
                f"{target}.biases": groups,
            }
        if name.endswith(_ROTATED):
            layout[_name_norm(name)] = TensorSpec(torch.bfloat16, (config.head_dim,))
    return layout


def convert_tensors(
    source: Source, weights: PackedWeights, config: MobileMoEConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the folder, each weight of the checkpoint read when it is its turn."""
    for name in tensor_shapes(config):
        if name not in weights:
            tensor = source.tensors[name]
            yield rename(name), tensor.to(torch.float32 if kept_in_float32(name) else torch.bfloat16)
            continue
        q, scale = weights.read(name)
        for target, part in _name_parts(name):
            yield from _pack(target, *(arrange(values, part, config.head_dim) for values in (q, scale)))
        if name.endswith(_ROTATED):
            yield _name_norm(name), torch.ones(config.head_dim, dtype=torch.bfloat16)


def _name_parts(name: str) -> list[tuple[str, str]]:
    """Return the modules that a weight becomes, each with the part of it."""
    experts = name.partition("feed_forward.")[0] + "mlp.switch_mlp"
    if name.endswith("gate_up_proj"):
        return [(f"{experts}.gate_proj", "gate"), (f"{experts}.up_proj", "up")]
    if name.endswith("experts.down_proj"):
        return [(f"{experts}.down_proj", "down")]
    return [(rename(name).removesuffix(".weight"), "rotated" if name.endswith(_ROTATED) else "")]


def _name_norm(name: str) -> str:
    return name.replace("_proj.", "_norm.")


def _pack(target: str, q: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield MLX's three tensors of int8 values in -8..7 [..., out, in] and float16 scales [..., out, in / group]."""
    scales = to_bfloat16_blocks(target, scale, q.shape[-1])
    yield f"{target}.weight", pack_words(q).view(torch.uint32)
    yield f"{target}.scales", scales
    yield f"{target}.biases", -8 * scales
