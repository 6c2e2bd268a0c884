"""Undocumented interfaces of eval's dependencies, each behind one function.

tests/eval/test_contracts.py holds what each function relies on. Every function imports its dependency when it is
called: code that needs one dependency does not load the others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.backend.partitioner import Partitioner
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

# torch: what the CPU can do.


def is_bfloat16_supported_by_cpu() -> bool:
    """Return whether oneDNN multiplies bfloat16 matrices on this CPU; it heeds ONEDNN_MAX_CPU_ISA."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# lm-eval: its task files and its inner functions.


def find_lm_eval_tasks() -> Path:
    """Return the folder of lm-eval's own task files."""
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def load_task_yaml(path: Path, *, functions: bool = True) -> dict[str, Any]:
    """Read an lm-eval task file, with its `include` files merged.

    Args:
        functions: resolve every `!function`, which imports the file beside it; else their names stand for them.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=functions)


def evaluate_tasks(
    lm: "HFLM", tasks: "list[ConfigurableTask]", items: Mapping[str, Sequence[int]], *, chat: bool = False
) -> dict[str, Any]:
    """Score items of task objects that are already built.

    lm-eval's documented entry, `simple_evaluate`, describes the machine on every call (pip, compilers, drivers), which
    takes seconds a benchmark. `evaluate` wants its tasks in the form that only `TaskManager.load` makes.

    Args:
        items: numbers of the items to score, by task name.
        chat: render the prompts by the model's chat template, with every example as a turn of its own.

    Returns:
        `results`: task name -> {"metric,filter": value}. `samples`: task name -> one record an item and filter, with
        the keys `filter`, `doc`, `target`, `arguments` (one tuple a request), `resps` and one key a metric.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.evaluate(
        lm,
        task_dict=TaskManager(include_defaults=False).load(tasks),
        samples={name: list(numbers) for name, numbers in items.items()},
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


def encode_pair(lm: "HFLM", context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of its continuation, as lm-eval scores them."""
    return lm._encode_pair(context, continuation)


def make_serializable(value: object) -> object:
    """Turn a value that JSON does not know into one that it does; for `json.dumps(default=...)`."""
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)


# ExecuTorch: its example Llama, which is no part of its API.


def build_llama(**sizes: Any) -> nn.Module:
    """Build ExecuTorch's example Llama on the meta device; `sizes` are its ModelArgs.

    Its layers share one causal mask [context, context]: each would allocate one, which the custom attention does not
    read.
    """
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    with torch.device("meta"):
        model = construct_transformer(ModelArgs(**sizes)).eval()
    for layer in model.layers:
        layer.attention.mask = model.layers[0].attention.mask
    return model


def use_custom_attention(model: nn.Module, int8_cache: bool = False) -> nn.Module:
    """Replace the KV cache and the attention of `build_llama`'s model by ExecuTorch's custom ops; return the model.

    Args:
        int8_cache: whether keys and values are rounded to INT8 with a range for each head and position, and queries
            too, so that attention multiplies integers.
    """
    from executorch.examples.models.llama.source_transformation import custom_kv_cache, sdpa

    model = sdpa.replace_sdpa_with_custom_op(custom_kv_cache.replace_kv_cache_with_custom_kv_cache(model))
    if int8_cache:  # it takes the place of the two that were just put in
        model = custom_kv_cache.replace_kv_cache_with_quantized_kv_cache(model)
        model = sdpa.replace_sdpa_with_quantized_sdpa(model)
    return model


def int4_embedding(packed: torch.Tensor, scales: torch.Tensor, width: int, group_size: int) -> nn.Module:
    """Return an embedding of INT4 rows that lowers to `embedding_4bit`.

    Args:
        packed: uint8 [rows, width / 2], the high nibble first, each value plus 8.
        scales: [rows, groups], or [rows] where a row is one group.
    """
    from executorch.examples.models.llama.source_transformation.quantize import QuantizedGroupEmbedding

    module = QuantizedGroupEmbedding(
        "cpu", packed.shape[0], width, group_size=group_size, dtype=torch.float32, packed=True, bitwidth=4
    )
    module.weight, module.scales = packed, scales
    return module


# ExecuTorch: passes, a partitioner's seams and its thread pool.


def register_executorch_ops() -> None:
    """Register the ops that exported programs call: llama::quantized_moe_ffn, the custom attention, embedding_4bit."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (importing it registers)
    from executorch.kernels import quantized  # noqa: F401  (importing it registers)


def set_executorch_threads(n: int) -> None:
    """Give the thread pool of ExecuTorch's runtime in this process `n` threads."""
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(n)


def remove_redundant_transposes(graph_module: torch.fx.GraphModule) -> None:
    """Drop, in place, the transpositions by which KV cache and attention undo each other.

    Without this a program copies the whole cache at every token.
    """
    from executorch.extension.llm.export.export_passes import RemoveRedundantTransposes

    RemoveRedundantTransposes()(graph_module)


def xnnpack_partitioner() -> "Partitioner":
    """Return XnnpackPartitioner without what only other networks need; tracing takes less than half the time.

    The compile spec makes XNNPACK's preprocessing run the pass that forms linears and leave out sixteen for
    convolutions, pooling and pads, each of which traces every delegate anew. And XNNPACK's ops are kept from being
    decomposed by name, without a check of every node: linears are all that it wants to keep of a transformer.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    class TransformerPartitioner(XnnpackPartitioner):
        def __init__(self):
            super().__init__()
            self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])

        def ops_to_not_decompose(self, ep):
            return super().ops_to_not_decompose(ep)[0], None

    return TransformerPartitioner()


def executorch_backend_config() -> "ExecutorchBackendConfig":
    """Return how an edge program becomes an ExecuTorch program: quantize ops fused, inputs left to the caller."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    return ExecutorchBackendConfig(
        passes=[QuantFusionPass()],
        do_quant_fusion_and_const_prop=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
    )


# torchao: a tensor class below `quantize_.workflows`.


def int4_linear_weight(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return INT4 weights with dynamic INT8 activations, as torchao's Int8DynamicActivationIntxWeightConfig does.

    Args:
        q: int8 values in -8..7, [out, in].
        scale: [out, groups].
    """
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    return IntxUnpackedToInt8Tensor(
        qdata=q,
        scale=scale.float(),
        zero_point=torch.zeros(scale.shape, dtype=torch.int8),
        target_dtype=torch.int4,  # type: ignore[attr-defined]  # torch has it, its type stubs do not
        block_size=(1, q.shape[1] // scale.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
