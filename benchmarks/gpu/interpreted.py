"""Runs the Triton code that inductor writes for an H100 in Triton's interpreter on the CPU, and compares it with eager.

    TRITON_INTERPRET=1 python -m benchmarks.gpu.interpreted [--case NAME ...]

The MoE layer (router, dispatch, experts, combination) goes both ways, and QAT rounds weights and activations, all
at toy size. Matrix products, top-k and other operators of aten run as they are, so attention is left out: its kernel is
one product after another. Prints JSON: the largest relative error of each result, and the number of kernels that ran.
"""

import argparse
import contextlib
import functools
import inspect
import json
import linecache
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo
import triton
import triton.language as tl
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx
from triton.runtime import interpreter

from benchmarks.gpu.lowering import Lowered, lower_graph
from benchmarks.gpu.one_rank import TOY
from titan_ext.mobilemoe import model_config
from titan_ext.quantization.qat import fake_quantize_activation, fake_quantize_weight
from titan_ext.quantization.shards import group_weight, round_groups

POINTWISE_BLOCK, REDUCTION_BLOCK, LOOP_BLOCK = 4096, 64, 256
"""Sizes of a program's block: of elements, of rows that are reduced, and of a row's part in a loop."""


@triton.jit
def _rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def _isnan(x):
    return x != x


@triton.jit
def _nearbyint(x):
    shifted = (x + 12582912.0) - 12582912.0  # 1.5 x 2^23: adding it leaves no bit for a fraction
    return tl.where(tl.abs(x) < 4194304.0, shifted, x)


@triton.jit
def _exp(x):
    return tl.exp(x)


@triton.jit
def _log(x):
    return tl.log(x)


LIBDEVICE = SimpleNamespace(rsqrt=_rsqrt, isnan=_isnan, nearbyint=_nearbyint, exp=_exp, log=_log)
"""The functions of NVIDIA's library that the kernels call, which the interpreter does not have."""


def round_as_a_gpu() -> None:
    """Make the interpreter round to the nearest bfloat16, for good, as a GPU does; by itself it cuts bits off."""
    convert = interpreter._convert_float

    def convert_nearest(value: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(value, source, target, mode)
        rounded = torch.from_numpy(np.array(value).view(np.float32)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert_nearest


class InterpretedKernel:
    """One kernel of inductor's code, which `run` interprets in place of a launch."""

    runs = 0
    """Number of kernels that were run in this process."""

    def __init__(self, name: str, source: str, *args: Any, **kwargs: Any):
        kept = [line for line in source.splitlines() if not line.startswith("triton_helpers.set_driver_to_gpu")]
        body = "\n".join(kept)
        start = body.index("@triton_heuristics.")
        body = body[:start] + body[body.index("@triton.jit", start) :]  # without the launcher of a GPU
        # The interpreter reads a function's source again, so it must be in a file.
        self.file = f"<{name}>"
        linecache.cache[self.file] = (len(body), None, body.splitlines(keepends=True), self.file)
        namespace: dict[str, Any] = {"__name__": name}
        exec(compile(body, self.file, "exec"), namespace)
        namespace["libdevice"] = LIBDEVICE
        self.function = namespace[name]
        self.adds_atomically = "tl.atomic_add(" in body

    def run(self, *args: Any, stream: Any = None) -> None:
        """Run the kernel on tensors of the CPU; the arguments are those of a launch."""
        names = list(inspect.signature(self.function.fn).parameters)
        blocks = [name for name in names if name.endswith("BLOCK")]
        values = dict(zip([name for name in names if name not in blocks], args, strict=True))
        reduces = any(name.startswith("r0_") for name in names)
        chosen = {}
        for name in blocks:
            limit = LOOP_BLOCK if name.startswith("R") else REDUCTION_BLOCK if reduces else POINTWISE_BLOCK
            size = values.get(f"{name[0].lower()}numel", limit)
            chosen[name] = min(limit, triton.next_power_of_2(max(size, 1)))
        grid = tuple(
            triton.cdiv(values[f"{axis}numel"], chosen[f"{axis.upper()}BLOCK"])
            for axis in "xyz"
            if f"{axis.upper()}BLOCK" in chosen
        )
        wide = {}
        if self.adds_atomically:  # the interpreter adds no bfloat16 numbers atomically
            wide = {name: value.float() for name, value in values.items() if is_bfloat16(value) and "out_ptr" in name}
        with np.errstate(all="ignore"):  # a kernel also computes the branches that it does not take
            self.function[grid or (1,)](**(values | wide), **chosen)
        for name, value in wide.items():
            values[name].copy_(value)
        InterpretedKernel.runs += 1


def is_bfloat16(value: object) -> bool:
    """Return whether an argument of a kernel is a tensor of bfloat16."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def load_interpreted(code: str) -> Callable[[list[Any]], Any]:
    """Return inductor's function of a graph, which takes a list of CPU tensors and interprets every kernel."""
    namespace: dict[str, Any] = {"__name__": "lowered"}
    with (
        patch.object(AsyncCompile, "triton", lambda self, *args, **kwargs: InterpretedKernel(*args, **kwargs)),
        patch.object(AsyncCompile, "wait", lambda self, scope: None),
    ):
        exec(compile(code, "<lowered>", "exec"), namespace)
    namespace["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    namespace["get_raw_stream"] = lambda device: 0

    def call(args: list[Any]) -> Any:
        with (
            patch.object(torch.cuda, "_DeviceGuard", lambda device: contextlib.nullcontext()),
            patch.object(torch.cuda, "set_device", lambda device: None),
        ):
            return namespace["call"](args)

    call._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd knows that a function takes a list
    return call


def compile_interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, or a module, compiled for an H100 and interpreted on the CPU."""

    def lower(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        found: list[Lowered] = []
        lower_graph(graph, inputs, found, **options)
        return load_interpreted(found[-1].code)

    return torch.compile(function, backend=functools.partial(compile_fx, inner_compile=lower), fullgraph=True)


def compare_moe(capacity_factor: float | None) -> dict[str, float]:
    """Return the errors of a training pass through the MoE layer: its output and all gradients."""
    config = model_config(TOY, z_loss_coefficient=1e-3, capacity_factor=capacity_factor).layers[0].moe
    config.router.gate.num_tokens_per_step = 64
    results = []
    for wrap in (compile_interpreted, lambda module: module):
        torch.manual_seed(0)
        layer = config.build()
        layer.init_states(buffer_device=torch.device("cpu"))
        for name, parameter in layer.named_parameters():
            if "router" not in name:
                parameter.data = parameter.data.bfloat16()
        x_BLD = torch.randn(2, 32, TOY.d_model).bfloat16().requires_grad_()
        out_BLD = wrap(layer.train())(x_BLD)
        out_BLD.float().square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"output": out_BLD.detach(), "input": x_BLD.grad, **gradients})
    return {name: measure_error(value, results[1][name]) for name, value in results[0].items()}


def compare_qat() -> dict[str, float]:
    """Return the errors of rounded weights, in both groupings, activations and shards. All must be 0."""
    torch.manual_seed(0)
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight_EFD, rows_RD = (torch.randn(3, 64, 96) * 0.02).to(dtype), torch.randn(40, 96).to(dtype)
        calls = {
            "weights in": (fake_quantize_weight, weight_EFD, 32, -1),
            "weights out": (fake_quantize_weight, weight_EFD, 32, -2),
            "activations": (fake_quantize_activation, rows_RD),
        }
        for name, (function, *args) in calls.items():
            errors[f"{name}, {dtype}"] = measure_error(compile_interpreted(function)(*args), function(*args))
        groups = group_weight(torch.randn(3, 64, 96) * 0.02, 2, 32)
        rounded = compile_interpreted(round_groups)(groups, dtype)
        errors[f"shards, {dtype}"] = measure_error(rounded, round_groups(groups, dtype))
    return errors


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


CASES = {
    "MoE, capacity 1": lambda: compare_moe(1.0),
    "MoE, dropless": lambda: compare_moe(None),
    "QAT": compare_qat,
}


def main() -> None:
    """Print the errors of the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="; ".join(CASES))
    names = parser.parse_args().case
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1 before Python starts; Triton reads it when it is imported")
    from tests.titan_ext.as_on_a_gpu import pretend_gpu

    pretend_gpu()
    round_as_a_gpu()
    torch._dynamo.config.capture_scalar_outputs = True
    found = {}
    for name in names:
        torch._dynamo.reset()
        before = InterpretedKernel.runs
        found[name] = {"errors": CASES[name](), "kernels": InterpretedKernel.runs - before}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
