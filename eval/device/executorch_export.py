"""This module writes the executorch format: one .pte with KV cache, INT4 linears in XNNPACK and a fused expert op.

The program has the signature that ExecuTorch's own Llama runners expect: `forward(tokens [1, T], input_pos [1])`, both
int64, returns the float32 logits [1, vocab_size] of the last token. T is dynamic up to the context, and `input_pos` is
the position of the first token. Constant methods describe the model to a runner (`get_bos_id`, `get_eos_ids`,
`get_max_context_len`, ...). The tokenizer is in the same folder as the program.
"""

from pathlib import Path
from typing import Any

import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import nn
from torch.nn.attention import SDPBackend

from core.atomic import write_json
from core.errors import RefusedInput
from eval.compat import (
    executorch_backend_config,
    register_executorch_ops,
    remove_redundant_transposes,
    xnnpack_partitioner,
)
from eval.config import DeviceConfig
from eval.device import expert_op
from eval.device.transformer import DenseDims, count_weight_bytes, dense_transformer, moe_transformer
from eval.device.weights import DeviceWeights
from eval.export.artifact_folder import new_folder
from eval.export.dimensions import dims_from_config
from eval.export.hf_folder import write_tokenizer
from eval.export.model_card import EXECUTORCH, EXECUTORCH_FAST_OP, write_model_card

PROGRAM = "model.pte"
"""Name of the program inside its artifact folder."""
SETTINGS = "program.json"
"""Name of the file with the program's constant methods and the bytes of its weights."""


def export_moe(weights: DeviceWeights, tokenizer_dir: Path, out: Path, device: DeviceConfig) -> Path:
    """Write the folder of a MobileMoE program (.pte, tokenizer, settings, model card, checksums) and return it.

    Args:
        weights: INT4 weights of any checkpoint.
        tokenizer_dir: folder of the tokenizer, as `eval.export.hf_folder.write_hf_folder` takes it.
        out: folder to write; it appears when it is complete, and replaces an earlier export.

    Raises:
        RefusedInput: the context is below 2 or longer than the model's, the tokenizer does not fit the model, or `out`
            exists and is not an export.
    """
    config = weights.config
    if not 2 <= device.context <= config.max_position_embeddings:
        raise RefusedInput(
            f"context is {device.context}; this model takes 2 to {config.max_position_embeddings} "
            "(max_position_embeddings)"
        )
    if device.expert_op == "fast":
        expert_op.declare()
    with new_folder(out, tokenizer_dir) as partial:
        write_tokenizer(tokenizer_dir, config, partial)
        settings = _settings(device.context, config.num_hidden_layers, config.vocab_size) | {
            "get_bos_id": config.bos_token_id,
            "get_eos_ids": config.eos_token_id,
            "uses_fast_expert_op": device.expert_op == "fast",
            "expert_group_size": weights.expert_group_size,
            "uses_int8_kv_cache": device.kv_cache == "int8",
        }
        model = moe_transformer(weights, device.context, device.expert_op, device.kv_cache)
        _write_settings(partial, settings, device.expert_op, model)
        lower(model, settings, partial / PROGRAM)
        form = f"ExecuTorch program, experts through the {device.expert_op} op"
        usage = EXECUTORCH_FAST_OP if device.expert_op == "fast" else EXECUTORCH
        write_model_card(partial, dims_from_config(config), form, usage)
    return out


def export_dense(dims: DenseDims, out: Path, context: int) -> Path:
    """Write the folder of a dense baseline's program with random weights (no tokenizer) and return it."""
    with new_folder(out, None) as partial:
        settings = _settings(context, dims.n_layers, dims.vocab_size)
        model = dense_transformer(dims, context)
        _write_settings(partial, settings, None, model)
        lower(model, settings, partial / PROGRAM)
    return out


def _settings(context: int, n_layers: int, vocab_size: int) -> dict[str, Any]:
    """Return the constant methods, with the names that ExecuTorch's runners look for."""
    return {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": n_layers,
        "get_vocab_size": vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _write_settings(folder: Path, settings: dict[str, Any], op_name: str | None, model: nn.Module) -> None:
    content = {"constant_methods": settings, "expert_op": op_name, "weights": count_weight_bytes(model)}
    write_json(folder / SETTINGS, content)


def lower(model: nn.Module, settings: dict[str, Any], path: Path) -> None:
    """Trace `model`, delegate its linears and all other ops that XNNPACK takes, and write the program to `path`.

    Args:
        model: module with the signature that `moe_transformer` describes.
        settings: constant methods of the program; `get_max_context_len` bounds the number of tokens.
    """
    register_executorch_ops()
    context = settings["get_max_context_len"]
    example = (torch.zeros(1, 2, dtype=torch.int64), {"input_pos": torch.zeros(1, dtype=torch.int64)})
    # The most tokens in one call are one less than the cache holds, as in ExecuTorch's own exporter. With more,
    # torch.export cannot prove that the slice of the mask is valid.
    shapes = ({1: torch.export.Dim("token_dim", max=context - 1)}, {"input_pos": {0: 1}})
    with torch.no_grad(), torch.nn.attention.sdpa_kernel([SDPBackend.MATH]):
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=True)
        # This gives the functional form, in which torchao's tensors are quantize and dequantize ops.
        program = program.run_decompositions({})
        remove_redundant_transposes(program.graph_module)
        edge = to_edge_transform_and_lower(
            program,
            # This partitioner also takes the dynamically quantized linears. ExecuTorch's example has a second one for
            # them. The numbers are the same; only the number of delegates differs.
            partitioner=[xnnpack_partitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=settings,
        )
    executorch_program = edge.to_executorch(executorch_backend_config())
    with path.open("wb") as file:
        executorch_program.write_to_file(file)
