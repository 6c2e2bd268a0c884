"""ExecuTorch programs: a checkpoint as one .pte with KV cache, INT4 linears in XNNPACK, a fused op for the experts.

The program has the signature ExecuTorch's own Llama runners expect: `forward(tokens [1, T], input_pos [1])`, both
int64, gives the logits [1, vocab_size] of the last token; T is dynamic up to the context, `input_pos` is the place of
the first token. Constant methods carry what a runner asks for (`get_bos_id`, `get_eos_ids`, `get_max_context_len`,
...); the tokenizer lies beside the program.
"""

import json
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::quantized_moe_ffn)
from executorch.extension.llm.export.export_passes import RemoveRedundantTransposes
from executorch.kernels import quantized  # noqa: F401  (registers embedding_4bit.out)
from torch import nn
from torch.nn.attention import SDPBackend

from core.errors import RefusedInput
from eval.config import DeviceConfig
from eval.device import expert_op
from eval.device.transformer import DenseDims, dense_transformer, moe_transformer, weights_read
from eval.device.weights import DeviceWeights
from eval.export.hf import new_folder, write_tokenizer
from eval.export.model_card import write_model_card

PROGRAM = "model.pte"
SETTINGS = "program.json"


def export_moe(weights: DeviceWeights, tokenizer_dir: Path, out: Path, device: DeviceConfig) -> Path:
    """Write the folder of a MobileMoE program: .pte, tokenizer, settings, model card, checksums.

    Args:
        weights: of any checkpoint (`eval.device.weights`).
        tokenizer_dir: as `eval.export.hf.write_hf_folder`.
        out: appears when it is complete and replaces an earlier export there.

    Raises:
        RefusedInput: a context longer than the model's, a tokenizer that does not fit, or something else at `out`.
    """
    config = weights.config
    if not 2 <= device.context <= config.max_position_embeddings:
        raise RefusedInput(
            f"context is {device.context}; this model takes 2 to {config.max_position_embeddings} "
            "(max_position_embeddings)"
        )
    if device.expert_op == "fast":
        expert_op.declare()
    with new_folder(out) as partial:
        write_tokenizer(tokenizer_dir, config, partial)
        settings = _settings(device.context, config.num_hidden_layers, config.vocab_size) | {
            "get_bos_id": config.bos_token_id,
            "get_eos_ids": config.eos_token_id,
            "uses_fast_expert_op": device.expert_op == "fast",
            "expert_group_size": weights.expert_group_size,
        }
        model = moe_transformer(weights, device.context, device.expert_op)
        _write_settings(partial, settings, device.expert_op, model)
        lower(model, settings, partial / PROGRAM)
        write_model_card(partial, config, f"ExecuTorch program, experts through the {device.expert_op} op")
    return out


def export_dense(dims: DenseDims, out: Path, context: int) -> Path:
    """Write the folder of a dense baseline's program with random weights: .pte, settings, checksums; no tokenizer."""
    with new_folder(out) as partial:
        settings = _settings(context, dims.n_layers, dims.vocab_size)
        model = dense_transformer(dims, context)
        _write_settings(partial, settings, None, model)
        lower(model, settings, partial / PROGRAM)
    return out


def _settings(context: int, n_layers: int, vocab_size: int) -> dict[str, Any]:
    """Constant methods by the names that ExecuTorch's runners look for."""
    return {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": n_layers,
        "get_vocab_size": vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _write_settings(folder: Path, settings: dict[str, Any], expert_op: str | None, model: nn.Module) -> None:
    content = {"constant_methods": settings, "expert_op": expert_op, "weights": weights_read(model)}
    (folder / SETTINGS).write_text(json.dumps(content, indent=2) + "\n")


class TransformerPartitioner(XnnpackPartitioner):
    """XnnpackPartitioner without what only other networks need, which makes tracing more than twice as fast.

    The compile spec makes XNNPACK's preprocessing run the pass that forms linears and leave out sixteen for
    convolutions, pooling and pads, each of which traces every delegate anew. And XNNPACK's ops are kept from being
    decomposed by name, without asking for each node: linears are all that it wants to keep of a transformer.
    """

    def __init__(self):
        super().__init__()
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])

    def ops_to_not_decompose(self, ep):
        return super().ops_to_not_decompose(ep)[0], None


def lower(model: nn.Module, settings: dict[str, Any], path: Path) -> None:
    """Trace `model`, hand its linears and what else XNNPACK takes to XNNPACK, and write the program."""
    context = settings["get_max_context_len"]
    example = (torch.zeros(1, 2, dtype=torch.int64), {"input_pos": torch.zeros(1, dtype=torch.int64)})
    # One less than the cache holds: torch.export cannot prove the mask's slice otherwise (ExecuTorch's exporter, too).
    shapes = ({1: torch.export.Dim("token_dim", max=context - 1)}, {"input_pos": {0: 1}})
    with torch.no_grad(), torch.nn.attention.sdpa_kernel([SDPBackend.MATH]):
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=True)
        # Functional form, torchao's tensors taken apart into quantize and dequantize.
        program = program.run_decompositions({})
        # Cache and attention each turn keys and values round: without this, copies of the whole cache at every token.
        RemoveRedundantTransposes()(program.graph_module)
        edge = to_edge_transform_and_lower(
            program,
            # Takes the dynamically quantized linears, too: a partitioner for them before it gives the same numbers in
            # half as many delegates more.
            partitioner=[TransformerPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods=settings,
        )
    executorch_program = edge.to_executorch(
        ExecutorchBackendConfig(
            passes=[QuantFusionPass()],
            do_quant_fusion_and_const_prop=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    with path.open("wb") as file:
        executorch_program.write_to_file(file)
