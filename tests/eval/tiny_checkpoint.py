"""A tiny MobileMoE with random weights and a tokenizer of its own, for the tests of this folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.config import ExportConfig
from eval.export.bf16 import export_bf16
from eval.export.dimensions import config_from_dims, int4_layout
from eval.export.int4 import export_int4
from eval.export.source import Source, open_folder
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from titan_ext.config import ModelDims, RopeScaling
from titan_ext.quantization.config import QuantizationConfig

# 64 positions as the original context put some of the 8 channel pairs of a head on either side of the scaling.
DIMS = ModelDims(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, expert_hidden=32, shared_hidden=128,
    n_experts=8, top_k=4, vocab_size=320, max_seq_len=256, rope_theta=10_000.0,
    rope_scaling=RopeScaling(factor=16.0, original_max_position_embeddings=64),
)  # fmt: skip

LLAMA_SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 5, "initializer_range": 0.3,
}  # fmt: skip
"""Sizes of tiny models of other architectures, for the same tokenizer."""

SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>", "<|python_tag|>", "<|eom_id|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def random_tensors(dims: ModelDims = DIMS, seed: int = 0) -> dict[str, torch.Tensor]:
    """float32 weights of the released names, large enough that attention and routing are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config_from_dims(dims)).items():
        tensors[name] = torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        if name.endswith("norm.weight"):
            tensors[name] += 1
    return tensors


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Train a byte-level BPE with the Llama-3 special tokens (320 entries at most) and save it as an HF folder."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[5],
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def quantize_folder(
    folder: Path, out: Path, quantization: QuantizationConfig | None = None, max_shard_bytes: int = 4 << 30
) -> Path:
    """Write the INT4 folder of an unquantized one; None takes the layout of its stored scales, or the default."""
    layout = None if quantization is None else int4_layout(quantization)
    return export_int4(replace(open_folder(folder), layout=layout), out, max_shard_bytes=max_shard_bytes)


def dequantize_folder(folder: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the unquantized folder of an INT4 one."""
    return export_bf16(open_folder(folder), out, dtype=dtype)


def write_int4_folder(
    tensors: Mapping[str, torch.Tensor],
    dims: ModelDims,
    tokenizer_dir: Path,
    out: Path,
    quantization: QuantizationConfig,
    *,
    max_shard_bytes: int = ExportConfig.max_shard_bytes,
    extra_config: dict[str, Any] | None = None,
) -> Path:
    """Write the INT4 folder of unquantized tensors, as `export_int4` does for a checkpoint of a run."""
    config = config_from_dims(dims, **(extra_config or {}))
    config.dtype = torch.bfloat16
    source = Source(tensors, config, tokenizer_dir, layout=int4_layout(quantization))
    return export_int4(source, out, max_shard_bytes=max_shard_bytes)


def write_bf16_folder(folder: Path) -> Path:
    """Write a random model of one narrow layer and its tokenizer as a BF16 folder; return it."""
    dims = replace(DIMS, n_layers=1)
    config = config_from_dims(dims)
    config.dtype = torch.bfloat16
    tokenizer = write_tokenizer(folder.with_name(f"{folder.name}-tokenizer"))
    return export_bf16(Source(random_tensors(dims), config, tokenizer), folder)
