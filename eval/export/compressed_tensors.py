"""The compressed-tensors format: a `glm4_moe` folder whose linears and experts are packed INT4, for vLLM and SGLang.

compressed-tensors' `pack-quantized` is symmetric, in groups of 32 along the input axis: what an INT4 folder holds. So
the values are packed anew and never rounded. Embedding and output projection, which are one matrix, stay bfloat16,
because these servers read packed linears only.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from core.atomic import write_json
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import dims_from_config, with_layout
from eval.export.glm4_moe import build_native_config, convert_tensors, describe_native, kept_in_float32, rename
from eval.export.hf_folder import write_tokenizer
from eval.export.hf_native import MAX_SHARD_BYTES
from eval.export.limits import INT4_BLOCK
from eval.export.model_card import COMPRESSED_TENSORS, write_model_card
from eval.export.packed_weights import PackedWeights, pack_words, to_bfloat16_blocks
from eval.export.shards import write_shards
from eval.export.source import Source
from eval.export.tensor_layout import TensorLayout, TensorSpec
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig

VALUES_PER_WORD = 8
"""Number of 4-bit values in an int32, the first in the lowest bits."""
_EMBEDDING = "model.embed_tokens.weight"


def export_compressed_tensors(source: Source, out: Path) -> Path:
    """Write the folder of a checkpoint and return `out`.

    Raises:
        RefusedInput: `glm4_moe` has no such model, the INT4 groups are no blocks of 32 along the input axis, or a scale
            is not exact in bfloat16.
    """
    config = with_layout(source.config, None)
    config.dtype = torch.bfloat16
    build_native_config(config)  # refuses what the class cannot express before anything is written
    weights = PackedWeights(source)
    weights.check_blocks("--format compressed-tensors", "export --format hf-native")
    with new_folder(out, source.tokenizer) as partial:
        write_tokenizer(source.tokenizer, config, partial)
        values = build_native_config(config) | {"transformers_version": transformers.__version__}
        write_json(partial / "config.json", values | {"quantization_config": describe_quantization()})
        form = "INT4 checkpoint (compressed-tensors, pack-quantized)"
        write_model_card(partial, dims_from_config(config), form, COMPRESSED_TENSORS)
        write_shards(pack_tensors(source, weights, config), describe_tensors(config), partial, MAX_SHARD_BYTES)
    return out


def describe_quantization() -> dict[str, Any]:
    """Return config.json's `quantization_config`."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": INT4_BLOCK,
        "dynamic": False, "observer": "minmax", "actorder": None, "block_structure": None, "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def describe_tensors(config: MobileMoEConfig) -> TensorLayout:
    """Return the tensors of the folder in the order of `pack_tensors`."""
    layout: TensorLayout = {}
    for name, spec in describe_native(config).items():
        if not is_packed(name, spec.shape):
            layout[name] = spec
            continue
        rows, columns = spec.shape
        layout |= {
            f"{name}_packed": TensorSpec(torch.int32, (rows, columns // VALUES_PER_WORD)),
            f"{name}_scale": TensorSpec(torch.bfloat16, (rows, columns // INT4_BLOCK)),
            f"{name}_shape": TensorSpec(torch.int64, (2,)),
        }
    return layout


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of the `glm4_moe` checkpoint is packed: linears are, the embedding and router are not."""
    return len(shape) == 2 and name != _EMBEDDING and not kept_in_float32(name)


def pack_tensors(source: Source, weights: PackedWeights, config: MobileMoEConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the folder, each weight of the checkpoint read when it is its turn."""
    for name in tensor_shapes(config):
        if name == _EMBEDDING:
            yield name, weights.dequantize(name, torch.bfloat16)
        elif name not in weights:
            native = rename(name)
            yield native, source.tensors[name].to(torch.float32 if kept_in_float32(native) else torch.bfloat16)
        else:
            q, scale = weights.read(name)
            parts = (convert_tensors([(name, values)], config) for values in (q, scale))
            for (native, own_q), (_, own_scale) in zip(*parts, strict=True):
                if own_q.dim() == 1:  # the weight of QK norm, which comes with q and k
                    yield native, torch.ones(config.head_dim, dtype=torch.bfloat16)
                else:
                    yield from _pack(native, own_q, own_scale)


def _pack(name: str, q: torch.Tensor, scale: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the three tensors of int8 values in -8..7 [out, in] and float16 scales [out, in / group]."""
    yield f"{name}_packed", pack_words(q).view(torch.int32)
    yield f"{name}_scale", to_bfloat16_blocks(name, scale, q.shape[1])
    yield f"{name}_shape", torch.tensor(q.shape, dtype=torch.int64)
