"""The kernels that inductor makes of one block for an H100, read off the Triton code it writes; needs no GPU.

    python -m benchmarks.gpu.lowering [--case NAME ...] [--out FOLDER]

A block of the published width is traced with fake tensors as a rank of one GPU traces it (flex attention, one graph),
with selective recomputation, and its forward and backward graphs are lowered on a mocked H100. Under QAT the weights
arrive rounded, as in training, and the rounding, once a step, is lowered apart. Printed for each graph: kernels of each
kind, atomic additions, operators that are left to aten, complex numbers, and the bytes that its kernels read and write,
beside the time they take at the roofline's bandwidth. --out keeps the code. No kernel is run, and matrix products count
with their bytes alone.
"""

import argparse
import copy
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
import torch._functorch.config
from functorch.compile import make_boxed_func
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.gpu.mocked_h100 import mock_h100
from benchmarks.gpu.one_rank import Training, describe_training
from benchmarks.gpu.table import make_table, shorten
from titan_ext.cards import Card
from titan_ext.config import FLAVORS, ModelDims
from titan_ext.mobilemoe import model_config
from titan_ext.mobilemoe.recomputation import KeepProducts
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.qat import QATModule, convert_to_qat
from titan_ext.quantization.shards import round_groups
from titan_ext.roofline import estimate_tokens_per_second

SIZES: dict[str, Any] = {"micro_batches": 64, "activation_checkpoint": "selective"}
CASES: dict[str, Callable[[], Training]] = {
    "S 2,048 capacity": lambda: describe_training(
        FLAVORS["S"], seq_len=2048, local_batch_size=8, capacity_factor=1.5, **SIZES
    ),
    "S 8,192 dropless": lambda: describe_training(FLAVORS["S"], seq_len=8192, local_batch_size=1, **SIZES),
    "S 8,192 QAT": lambda: describe_training(FLAVORS["S"], seq_len=8192, local_batch_size=1, quantize=True, **SIZES),
    "M 2,048 capacity": lambda: describe_training(
        FLAVORS["M"], seq_len=2048, local_batch_size=8, capacity_factor=1.5, **SIZES
    ),
    "L 2,048 capacity": lambda: describe_training(
        FLAVORS["L"], seq_len=2048, local_batch_size=8, capacity_factor=1.5, **SIZES
    ),
}
PRODUCTS = re.compile(r"(?:^|\.)(?:mm|addmm|bmm|_grouped_mm|baddbmm)(?:\.default)?$")
COMPLEX = re.compile(r"complex|view_as_real|conj")
LARGEST = 12
"""Number of kernels that are listed, those that move most bytes."""


@dataclasses.dataclass
class Lowered:
    """`lower_graph` makes one of each graph that it lowers."""

    name: str
    """`forward`, `backward`, or `rounding`."""
    code: str
    moved: list[tuple[str, str, int]]
    """Kind, operators and bytes of each kernel; bytes are read or written by it."""

    def count_calls(self) -> Counter[str]:
        """Return operator or kernel -> number of calls in the code's `call` function that are not Triton's own."""
        called = re.findall(r"(?:extern_kernels|torch\.ops)\.([\w.]+)\(", self.code)
        return Counter(name.removeprefix("aten.") for name in called)


class _Lowered(Exception):
    """Ends the work of inductor once the code is written: it could not be loaded here."""


def trace_block(training: Training, lower: Callable[..., Any]) -> int:
    """Trace forward and backward pass of a block, and return the number of graphs.

    Args:
        lower: compiles a graph in inductor's place; gets it with its inputs.
    """
    stage = training.stage
    dims = dataclasses.replace(training.dims, n_layers=1, max_seq_len=stage.seq_len)
    config = model_config(dims, z_loss_coefficient=stage.router_z_loss, capacity_factor=stage.capacity_factor)
    config = convert_to_qat(config, QuantizationConfig()) if stage.quantize else config
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = config.build()
        model.init_states(buffer_device=torch.device("cpu"))
        prepare_parameters(model)
        if training.parallel.activation_checkpoint == "selective":
            KeepProducts.Config().build(dump_folder="").apply(model)
        model.train()
        for module in model.modules():
            if isinstance(module, QATModule):
                module.rounds_weights = False
        (block,) = model.layers.values()
        B, L = stage.local_batch_size, stage.seq_len
        x_BLD = torch.empty(B, L, dims.d_model, dtype=torch.bfloat16, requires_grad=True)
        positions_BL = torch.arange(L).repeat(B, 1)
        mask = create_block_mask(lambda b, h, q, k: q >= k, B, None, L, L, device="cpu")
        compiled = torch.compile(block, backend=functools.partial(compile_fx, inner_compile=lower), fullgraph=True)
        compiled(x_BLD, mask, positions_BL)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def trace_rounding(dims: ModelDims, lower: Callable[..., Any]) -> None:
    """Trace the rounding of the largest weight of a layer, all experts' gate, as a step does it once."""
    torch._dynamo.reset()
    backend = functools.partial(compile_fx, inner_compile=lower)
    group_size = QuantizationConfig().group_size
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        groups = torch.empty(dims.n_experts * dims.expert_hidden * dims.d_model // group_size, group_size)
        torch.compile(round_groups, backend=backend, fullgraph=True)(groups, torch.bfloat16)


def prepare_parameters(model: torch.nn.Module) -> None:
    """Give the parameters the dtypes in which FSDP2 gathers them: bfloat16, the router's float32.

    The routers also get a number of tokens, without which they refuse to compute the z-loss.
    """
    for block in model.layers.values():
        block.moe.router.gate.num_tokens_per_step = 1 << 22
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.bfloat16()


def lower_graph(
    graph: torch.fx.GraphModule, inputs: list[Any], found: list[Lowered], **options: Any
) -> Callable[..., Any]:
    """Lower a graph of the CPU on the mocked H100, add the result to `found`, and return the graph itself."""
    on_gpu, gpu_inputs = move_to_gpu(copy.deepcopy(graph), inputs)
    name = "backward" if options.get("is_backward") else "forward"

    def write_code(lowering: GraphLowering) -> None:
        code, _ = lowering.codegen()
        moved = [describe_kernel(node) for node in lowering.scheduler.nodes]
        found.append(Lowered(name, code.value, moved))
        raise _Lowered

    before = len(found)
    # Inductor begins to compile a kernel while it writes the next ones.
    start_nothing = patch.object(AsyncCompile, "triton", lambda self, *args, **kwargs: None)
    with mock_h100(), start_nothing, patch.object(GraphLowering, "compile_to_module", write_code):
        try:
            compile_fx_inner(on_gpu, gpu_inputs, **options)
        except Exception:  # inductor wraps `_Lowered` in its own error
            if len(found) == before:
                raise
    return make_boxed_func(graph.forward)


def move_to_gpu(graph: torch.fx.GraphModule, inputs: list[Any]) -> tuple[torch.fx.GraphModule, list[Any]]:
    """Return the graph and its fake inputs on device `cuda` in place of `cpu`."""
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    cuda = torch.device("cuda", 0)

    def move(value: Any) -> Any:
        return mode.fake_tensor_converter.from_meta_and_device(mode, _to_meta(value), cuda)

    moved = [move(value) if isinstance(value, FakeTensor) else value for value in inputs]
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.kwargs = {key: cuda if is_cpu(value) else value for key, value in node.kwargs.items()}
                node.args = tuple(cuda if is_cpu(value) else value for value in node.args)
            module.recompile()
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    return graph, moved


def _to_meta(value: FakeTensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def is_cpu(value: object) -> bool:
    """Return whether an argument of an operator is the CPU device."""
    return isinstance(value, torch.device) and value.type == "cpu"


def describe_kernel(node: Any) -> tuple[str, str, int]:
    """Return kind, operators and bytes of one kernel of inductor's scheduler."""
    operators: dict[str, None] = {}
    for part in node.get_nodes():
        for origin in getattr(part.node, "origins", None) or ():
            operators[str(origin.target).removeprefix("aten.").removesuffix(".default")] = None
    kind = "Triton"
    if node.is_extern():
        kind = type(node.node).__name__
    elif node.is_template():
        kind = "template"
    return kind, ", ".join(operators), int(node.get_read_write_buffers_sizes())


def report(name: str, training: Training, graphs: int, lowered: list[Lowered]) -> str:
    """Return the report of a case as Markdown."""
    card = Card()
    rows = [describe_graph(name, graph, card) for graph in lowered]
    head = (
        "block", "Triton kernels", "products", "atomic additions", "left to aten", "complex", "GB moved",
        "ms at the bandwidth",
    )  # fmt: skip
    block = [graph for graph in lowered if graph.name != "rounding"]
    kernels = sorted(((*kernel, graph.name) for graph in block for kernel in graph.moved), key=lambda row: -row[2])
    largest = [
        (f"{shorten(operators)} ({kind}, {side})", f"{size / 1e9:.2f}", f"{size / card.bandwidth * 1e3:.2f}")
        for kind, operators, size, side in kernels[:LARGEST]
    ]
    layer = time_layer(training)
    total = sum(kernel[2] for kernel in kernels) / card.bandwidth * 1e3
    text = (
        f"{name}: {graphs} graph a block and no break. All kernels together move "
        f"{sum(kernel[2] for kernel in kernels) / 1e9:.1f} GB a layer, {total:.1f} ms; the roofline gives a layer "
        f"{layer * 1e3:.1f} ms, products included."
    )
    return "\n\n".join([text, make_table(head, rows), make_table(("largest kernels", "GB", "ms"), largest)])


def describe_graph(name: str, graph: Lowered, card: Card) -> tuple[str, ...]:
    """Return the row of a graph in the table."""
    calls = graph.count_calls()
    kernels = re.findall(r"^def triton_\w+\(", graph.code, re.MULTILINE)
    products = sum(count for call, count in calls.items() if PRODUCTS.search(call))
    others = ", ".join(f"{call} {count}" for call, count in sorted(calls.items()) if not PRODUCTS.search(call))
    complex_calls = sum(count for call, count in calls.items() if COMPLEX.search(call))
    moved = sum(size for _, _, size in graph.moved)
    numbers = (len(kernels), products, graph.code.count("tl.atomic_add("))
    times = (f"{moved / 1e9:.2f}", f"{moved / card.bandwidth * 1e3:.2f}")
    return (f"{name}, {graph.name}", *map(str, numbers), others or "none", str(complex_calls), *times)


def time_layer(training: Training) -> float:
    """Return the roofline's seconds of a layer in a micro-batch: what one more layer adds."""
    times = []
    for layers in (1, 2):
        dims = dataclasses.replace(training.dims, n_layers=layers)
        rate = estimate_tokens_per_second(dims, training.stage, training.parallel)
        times.append(training.stage.local_batch_size * training.stage.seq_len / rate)
    return times[1] - times[0]


def lower_case(name: str) -> tuple[Training, int, list[Lowered]]:
    """Return a case, its number of graphs, and its lowered graphs: forward and backward pass, and QAT's rounding."""
    training, found = CASES[name](), []
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        graphs = trace_block(training, functools.partial(lower_graph, found=found))
    found.sort(key=lambda lowered: lowered.name == "backward")
    if training.stage.quantize:
        rounding: list[Lowered] = []
        trace_rounding(training.dims, functools.partial(lower_graph, found=rounding))
        found.extend(dataclasses.replace(lowered, name="rounding") for lowered in rounding)
    return training, graphs, found


def main() -> None:
    """Print the report of each case that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--out", type=Path, help="folder for the code of every graph")
    arguments = parser.parse_args()
    from tests.titan_ext.as_on_a_gpu import pretend_gpu

    pretend_gpu()
    for name in arguments.case:
        training, graphs, lowered = lower_case(name)
        for graph in lowered if arguments.out else ():
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / f"{name.replace(' ', '_').replace(',', '')}_{graph.name}.py").write_text(graph.code)
        print(report(name, training, graphs, lowered), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
