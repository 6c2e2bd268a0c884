"""The gguf format: one file for llama.cpp and the programs built on it, as the architecture `exaone-moe`.

`exaone-moe` has MobileMoE's router, QK norm and shared expert, and it reads llama3's scaling of rotary positions from
the file (`rope_freqs`). It rotates in layers with a sliding window only, so all layers have one, longer than any
context; and its output projection is a tensor of its own, so the embedding is written twice. llama.cpp's `glm4moe` has
neither drawback, but it takes the scaling from its command line and not from the file.

Q4_0 is llama.cpp's name for what an INT4 folder holds: groups of 32 along the input axis with a float16 scale and
values of -8 to 7. So the values are packed anew and never rounded. llama.cpp's own quantizer would choose other scales
than the ones that the model was trained with.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from core.errors import RefusedInput
from eval.config import GgufConfig
from eval.export.artifact_folder import new_folder
from eval.export.chunks import map_chunks
from eval.export.dimensions import dims_from_config, with_layout
from eval.export.gguf_tokenizer import write_tokenizer
from eval.export.glm4_moe import arrange
from eval.export.hf_folder import read_tokenizer
from eval.export.limits import INT4_BLOCK
from eval.export.model_card import LICENSE_NOTE_FILE, llama_cpp_usage, write_model_card
from eval.export.packed_weights import PackedWeights
from eval.export.source import Source
from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32, tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig
from titan_ext.model_stats import count_parameters

ARCHITECTURE = "exaone-moe"
SLIDING_WINDOW = 1 << 20
"""Number of tokens that a layer sees: more than any context."""
TYPES = {
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
}
"""Name of a type -> type of the matrices, type of the file. Norms, router and expert bias are float32 in all."""
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

_LAYER = (
    ("attn_norm.weight", "input_layernorm.weight", ""),
    ("attn_q.weight", "self_attn.q_proj.weight", "rotated"),
    ("attn_k.weight", "self_attn.k_proj.weight", "rotated"),
    ("attn_v.weight", "self_attn.v_proj.weight", ""),
    ("attn_output.weight", "self_attn.o_proj.weight", ""),
    ("attn_q_norm.weight", "", "ones"),
    ("attn_k_norm.weight", "", "ones"),
    ("ffn_norm.weight", "post_attention_layernorm.weight", ""),
    ("ffn_gate_inp.weight", "feed_forward.router.weight", ""),
    ("exp_probs_b.bias", "feed_forward.expert_bias", ""),
    ("ffn_gate_shexp.weight", "feed_forward.shared_expert.gate_proj.weight", ""),
    ("ffn_up_shexp.weight", "feed_forward.shared_expert.up_proj.weight", ""),
    ("ffn_down_shexp.weight", "feed_forward.shared_expert.down_proj.weight", ""),
    ("ffn_gate_exps.weight", "feed_forward.experts.gate_up_proj", "gate"),
    ("ffn_up_exps.weight", "feed_forward.experts.gate_up_proj", "up"),
    ("ffn_down_exps.weight", "feed_forward.experts.down_proj", "down"),
)
"""Tensors of a layer: name in the file, name in MobileMoE, and what is done to it."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    source: str
    """MobileMoE's name; empty for weights of QK norm, which are one, and for the factors of rotary positions."""
    part: str
    shape: tuple[int, ...]
    """[out, in], [E, out, in] or [n]; llama.cpp counts dimensions from the last."""

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor has the type that was asked for; the others are float32."""
        return len(self.shape) > 1 and not kept_in_float32(self.source)


def export_gguf(source: Source, out: Path, config: GgufConfig) -> Path:
    """Write the folder with the GGUF file of a checkpoint and return `out`.

    At most one tensor of the checkpoint and one of the file are in memory.

    Raises:
        RefusedInput: the model has no shared expert, the INT4 groups are no Q4_0 blocks, or llama.cpp cannot split
            text as the tokenizer does.
    """
    model = with_layout(source.config, None)
    if not model.intermediate_size_mlp:
        raise RefusedInput(f"this model has no shared expert, and llama.cpp's {ARCHITECTURE} has one")
    weights = _Weights(source, config.type)
    with new_folder(out, source.tokenizer) as partial:
        tokenizer = read_tokenizer(source.tokenizer, model)
        file = f"model-{config.type}.gguf"
        writer = GGUFWriter(partial / file, ARCHITECTURE)
        write_metadata(writer, model, source, config.type)
        write_tokenizer(writer, source.tokenizer, tokenizer.chat_template, model)
        form = f"GGUF {config.type.upper()} for llama.cpp"
        write_model_card(partial, dims_from_config(model), form, llama_cpp_usage(file))
        _write_tensors(writer, weights, model, config.type)
    return out


def list_tensors(config: MobileMoEConfig) -> list[GgufTensor]:
    """Return the tensors of the file in the order in which they are written."""
    shapes = tensor_shapes(config)
    embedding = "model.embed_tokens.weight"
    rows = [("token_embd.weight", embedding, ""), ("output.weight", embedding, "")]
    for i in range(config.num_hidden_layers):
        rows += [(f"blk.{i}.{name}", own and f"model.layers.{i}.{own}", part) for name, own, part in _LAYER]
    rows.append(("output_norm.weight", "model.norm.weight", ""))
    tensors = [GgufTensor(*row, _arrange_shape(shapes.get(row[1], (config.head_dim,)), row[2])) for row in rows]
    if config.rope_scaling:
        tensors.append(GgufTensor("rope_freqs.weight", "", "rope", (config.head_dim // 2,)))
    return tensors


def _arrange_shape(shape: tuple[int, ...], part: str) -> tuple[int, ...]:
    if part not in ("gate", "up", "down"):
        return shape
    experts, inputs, outputs = shape
    return (experts, outputs if part == "down" else outputs // 2, inputs)


def write_metadata(writer: GGUFWriter, config: MobileMoEConfig, source: Source, type_name: str) -> None:
    """Write what the file says of the model: origin, licence, dimensions, routing and rotary positions."""
    count = count_parameters(dims_from_config(config))
    label = (
        f"{count.total / 1e9:.1f}B-A{count.active / 1e9:.1f}B" if count.total >= 1e9 else f"{count.total / 1e6:.0f}M"
    )
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"MobileMoE {label}")
    writer.add_size_label(label)
    writer.add_description(f"MobileMoE (arXiv 2605.27358), from {source.origin}")
    writer.add_license("other")
    writer.add_license_name("see-license-note")
    writer.add_license_link(LICENSE_NOTE_FILE)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, source.origin)
    if type_name == "q4_0":
        writer.add_quantized_by("quantization-aware training: the INT4 groups of the checkpoint, repacked")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(TYPES[type_name][1])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size_mlp)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(1)
    writer.add_expert_shared_feed_forward_length(config.intermediate_size_mlp)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(0)
    writer.add_sliding_window(SLIDING_WINDOW)
    writer.add_sliding_window_pattern([True] * config.num_hidden_layers)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def compute_rope_divisors(config: MobileMoEConfig) -> NDArray[np.float32]:
    """Return what llama3's scaling divides every frequency by, float32 [head_dim / 2]."""
    scaling: Any = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi * config.rope_theta**exponents)
    smooth = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
    return (1 / (smooth + (1 - smooth) / scaling["factor"])).astype(np.float32)


class _Weights:
    """Reads the weights of a checkpoint, INT4 or not, as the file has them."""

    def __init__(self, source: Source, type_name: str):
        """Find which weights are INT4.

        Raises:
            RefusedInput: the groups of Q4_0 were asked for, and the checkpoint's are others.
        """
        self._source, self._config = source, source.config
        self._packed = PackedWeights(source) if type_name == "q4_0" or source.is_int4 else None
        if type_name == "q4_0" and self._packed is not None:
            self._packed.check_blocks("--type q4_0", "export --type bf16")

    def read(self, tensor: GgufTensor, type_name: str) -> NDArray:
        """Return a matrix in its type, uint8 bytes [out, bytes of a row] with leading E for experts; others float32."""
        if not tensor.is_matrix:
            return self._read_float32(tensor)
        if type_name != "q4_0":
            values = self._read_floats(tensor.source, _DTYPES[type_name])
            return _convert(self._arrange(values, tensor), type_name)
        assert self._packed is not None
        q, scale = self._packed.read(tensor.source)
        return _encode_rows(self._arrange(q, tensor), self._arrange(scale, tensor))

    def _read_float32(self, tensor: GgufTensor) -> NDArray[np.float32]:
        """Return a tensor that is float32 in every file."""
        if tensor.part == "ones":
            return np.ones(tensor.shape, np.float32)
        if tensor.part == "rope":
            return compute_rope_divisors(self._config)
        return self._source.tensors[tensor.source].float().numpy()

    def _read_floats(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._source.tensors[name] if self._packed is None else self._packed.dequantize(name, dtype)

    def _arrange(self, values: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
        return arrange(values, tensor.part, self._config.head_dim)


def _convert(values: torch.Tensor, type_name: str) -> NDArray:
    """Return floats [..., out, in] as bytes [..., out, in * size] of a type."""

    def convert(part: torch.Tensor) -> torch.Tensor:
        converted = part.to(_DTYPES[type_name])
        if not converted.isfinite().all():
            raise RefusedInput(f"--type {type_name}: a weight is beyond its range; choose bf16 or f32")
        return converted

    return map_chunks(convert, values).view(torch.uint8).numpy()


def _encode_rows(q: torch.Tensor, scale: torch.Tensor) -> NDArray[np.uint8]:
    """Return int8 values [..., out, in] and float16 scales [..., out, in / group] as Q4_0 blocks, uint8."""
    repeats = q.shape[-1] // INT4_BLOCK // scale.shape[-1]

    def encode(part: torch.Tensor, part_scale: torch.Tensor) -> torch.Tensor:
        return encode_q4_0(part, part_scale.repeat_interleave(repeats, dim=-1))

    return map_chunks(encode, q, scale).numpy()


def encode_q4_0(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return int8 values in -8..7 [..., n] and float16 scales [..., n / 32] as Q4_0 blocks, uint8 [..., n / 32 * 18].

    A block is its scale in two bytes, then 16 bytes: value i + 8 in the low nibble, value i + 16 (+ 8) in the high one
    (`block_q4_0` of ggml).
    """
    low_high = (q + 8).to(torch.uint8).unflatten(-1, (-1, 2, INT4_BLOCK // 2))
    values = low_high[..., 0, :] | (low_high[..., 1, :] << 4)
    scale_bytes = scale.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    return torch.cat((scale_bytes, values), dim=-1).flatten(-2)


def _write_tensors(writer: GGUFWriter, weights: _Weights, config: MobileMoEConfig, type_name: str) -> None:
    """Write the header, then one tensor after the other."""
    tensors = list_tensors(config)
    for tensor in tensors:
        kind = TYPES[type_name][0] if tensor.is_matrix else GGMLQuantizationType.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(weights.read(tensor, type_name))
    writer.close()
