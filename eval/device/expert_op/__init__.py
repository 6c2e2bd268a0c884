"""This package builds, loads and declares our MoE operator for ExecuTorch, `mobilemoe::quantized_moe_ffn`.

The operator takes the arguments of ExecuTorch's `llama::quantized_moe_ffn`, but weights in a smaller layout
(`eval.device.expert_blobs.pack_blobs`), and rounds activations to INT8 as that op's ARM build does. It has kernels for
AVX512-VNNI, AVX2, ARM's matrix and dot product instructions, and in portable C++; the fastest that the processor has is
chosen when the library is loaded. The C++ sources are beside this file, compiled on first use against headers and
libraries of the installed executorch wheel. Only the .cpp files need those; the arithmetic in the headers does not.
`matrix_ops` has two more operators of the library.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
from pathlib import Path

import torch

from core.cache import cache_dir, identify_machine
from core.errors import DamagedData
from eval.device.compiler import compile_file
from eval.device.expert_blobs import blob_bytes, pack_blobs

SOURCES = [Path(__file__).with_name(name) for name in ("moe_ffn.cpp", "matrix_ops.cpp")]
ARITHMETIC_FLAGS = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffinite-math-only", "-fno-signed-zeros",
    "-fassociative-math",
)  # fmt: skip
"""Compiler options of whatever includes the kernels. They leave out -ffast-math, which would flush denormals to zero in
the whole process, and -freciprocal-math, because quantize_row must divide exactly as the formula of INT8 does."""
FLAGS = (*ARITHMETIC_FLAGS, "-fPIC", "-shared", "-DC10_USING_CUSTOM_GENERATED_MACROS", "-DET_USE_THREADPOOL")

_SCHEMA = (
    "(Tensor x, Tensor gate_weight, Tensor expert_bias, Tensor packed_w13, Tensor packed_w2, "
    "int num_activated_experts, int num_experts, int hidden_dim, int dim, int group_size, int weight_nbit, "
    "str score_func, float route_scale"
)


def library_path() -> Path:
    """Return the path of the compiled library; build it if the cache does not have it.

    It is in `core.cache.cache_dir()`/device_op, in a folder named by a hash of the sources, the flags, the kind of
    machine with its compiler, and the executorch wheel, whose version and place the library holds.

    Raises:
        RefusedInput: no C++ compiler is on the path, or it fails.
    """
    import executorch

    version = importlib.metadata.version("executorch")
    wheel = Path(executorch.__path__[0])
    facts = (*FLAGS, version, str(wheel), identify_machine())
    sources = [*SOURCES, *sorted(Path(__file__).parent.glob("*.h"))]
    content = b"".join(path.read_bytes() for path in sources) + " ".join(facts).encode()
    library = cache_dir() / "device_op" / hashlib.sha256(content).hexdigest()[:16] / "libmobilemoe_op.so"
    if not library.is_file():
        _build(wheel, library)
    return library


def _build(wheel: Path, library: Path) -> None:
    compile_file(
        os.environ.get("CXX", "g++"), [*list_arguments(wheel), f"-Wl,-rpath,{wheel / 'lib'}"], library,
        what="the fast expert op",
        advice="install one (apt-get install g++), name it in $CXX, or export with --expert-op stock",
    )  # fmt: skip


def list_arguments(wheel: Path) -> list[str]:
    """Return the compiler's arguments for the library.

    Args:
        wheel: the folder `executorch` of an installed wheel, for the processor that is compiled for.
    """
    includes = [f"-I{wheel / 'include'}", f"-I{wheel / 'include/executorch/runtime/core/portable_type/c10'}"]
    libraries = [f"-L{wheel / 'lib'}", "-l:libexecutorch.so", "-l:libexecutorch_threadpool.so"]
    return [*FLAGS, *map(str, SOURCES), *includes, *libraries]


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library into this process, once; this registers the op with ExecuTorch's runtime.

    Raises:
        DamagedData: the kernel for this processor computes something else than the portable one.
    """
    from executorch.extension.pybindings import portable_lib  # noqa: F401  (the runtime the op registers with)

    path = library_path()
    library = ctypes.CDLL(str(path))
    library.mobilemoe_kernels.restype = ctypes.c_char_p
    library.mobilemoe_experts_read.restype = ctypes.c_int64
    compare_kernels(library, path)
    return library


def list_kernels(library: ctypes.CDLL | None = None) -> list[str]:
    """Return the names of the kernels that this processor has, the fastest first.

    Args:
        library: the op's library; None for the one that `load` returns.
    """
    return (load() if library is None else library).mobilemoe_kernels().decode().split(",")


def compare_kernels(library: ctypes.CDLL, path: Path) -> None:
    """Compare the kernel that the library chose with the portable one on a small layer of fixed numbers.

    Raises:
        DamagedData: they differ by more than rounding; names the library.
    """
    generator = torch.Generator().manual_seed(0)
    n_experts, d_model, hidden, group_size = 4, 64, 64, 32

    def draw_blobs(rows: int, k: int) -> torch.Tensor:
        values = torch.randint(-8, 8, (n_experts, rows, k), generator=generator, dtype=torch.int8)
        return pack_blobs(values, (torch.rand(n_experts, rows, k // group_size, generator=generator) * 0.1).half())

    x_TD, gate_ED = (torch.randn(n, d_model, generator=generator) for n in (5, n_experts))
    layer = (x_TD, gate_ED, None, draw_blobs(2 * hidden, d_model), draw_blobs(d_model, hidden))
    chosen = list_kernels(library)[0]
    found, expected = (
        run_kernel(
            kernel, *layer, top_k=2, expert_hidden=hidden, group_size=group_size, route_scale=1.0, library=library
        )
        for kernel in (chosen, "portable")
    )
    if not (found - expected).norm() < 5e-3 * expected.norm():
        raise DamagedData(
            f"{path}: its kernel {chosen!r} computes something else than the portable one; remove the folder, and the "
            "op is compiled again"
        )


def run_kernel(
    kernel: str,
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    bias_E: torch.Tensor | None,
    packed_w13: torch.Tensor,
    packed_w2: torch.Tensor,
    *,
    top_k: int,
    expert_hidden: int,
    group_size: int,
    route_scale: float,
    library: ctypes.CDLL | None = None,
) -> torch.Tensor:
    """Return the routed experts' output [T, D], float32, computed by one of `list_kernels()`.

    Args:
        x_TD: tokens, contiguous float32.
        gate_ED: router weight, contiguous float32.
        bias_E: expert bias, contiguous float32; None for none.
        packed_w13, packed_w2: gate and up rows, and down rows, as `eval.device.expert_blobs.pack_blobs` returns them.
        library: the library that computes; None for the one that `load` returns.

    Raises:
        ValueError: this processor does not have the kernel's instructions; or a tensor or size does not fit the layer.
    """
    check_layer(x_TD, gate_ED, bias_E, packed_w13, packed_w2, top_k, expert_hidden, group_size)
    library = load() if library is None else library
    (n_tokens, d_model), n_experts = x_TD.shape, gate_ED.shape[0]
    out_TD = torch.empty(n_tokens, d_model)
    sizes = [ctypes.c_int64(n) for n in (n_tokens, d_model, expert_hidden, n_experts, top_k, group_size)]
    inputs = [
        None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x_TD, gate_ED, bias_E, packed_w13, packed_w2)
    ]
    refused = library.mobilemoe_run(
        kernel.encode(), *sizes, *inputs, ctypes.c_double(route_scale), ctypes.c_void_p(out_TD.data_ptr())
    )
    if refused:
        available = ", ".join(list_kernels(library))
        raise ValueError(f"this processor does not have the kernel {kernel!r}; it has {available}")
    return out_TD


def check_layer(
    x_TD: torch.Tensor,
    gate_ED: torch.Tensor,
    bias_E: torch.Tensor | None,
    packed_w13: torch.Tensor,
    packed_w2: torch.Tensor,
    top_k: int,
    expert_hidden: int,
    group_size: int,
) -> None:
    """Check what the library gets as bare pointers; the op itself checks the same in ExecuTorch's runtime.

    Raises:
        ValueError: a tensor has another dtype, shape or layout, or a size is out of its range.
    """
    if x_TD.dim() != 2 or gate_ED.dim() != 2:
        raise ValueError(f"x is {list(x_TD.shape)} and gate {list(gate_ED.shape)}: give [T, D] and [E, D]")
    d_model, n_experts = x_TD.shape[1], gate_ED.shape[0]
    if group_size < 32 or group_size % 32:
        raise ValueError(f"group_size is {group_size}: give a multiple of 32, from 32")
    for name, size in (("dim", d_model), ("hidden_dim", expert_hidden)):
        if size < group_size or size % group_size:
            raise ValueError(f"{name} is {size}: give a multiple of group_size {group_size}")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k is {top_k}: give 1 to {n_experts}, the number of experts")
    expected = {
        "x": (x_TD, torch.float32, tuple(x_TD.shape)),
        "gate": (gate_ED, torch.float32, (n_experts, d_model)),
        "packed_w13": (packed_w13, torch.uint8, (n_experts, blob_bytes(2 * expert_hidden, d_model, group_size))),
        "packed_w2": (packed_w2, torch.uint8, (n_experts, blob_bytes(d_model, expert_hidden, group_size))),
    } | ({} if bias_E is None else {"bias": (bias_E, torch.float32, (n_experts,))})
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: give {dtype} {list(shape)}, cpu"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: give {name}.contiguous()")


@functools.cache
def declare() -> torch.library.Library:
    """Declare the op to torch, so that a model that calls it can be exported; call this before tracing."""
    library = torch.library.Library("mobilemoe", "DEF")
    library.define(f"quantized_moe_ffn{_SCHEMA}) -> Tensor")
    library.define(f"quantized_moe_ffn.out{_SCHEMA}, *, Tensor(a!) out) -> Tensor(a!)")
    library.impl("quantized_moe_ffn", _eager, "CPU")
    library.impl("quantized_moe_ffn", lambda x, *_: torch.empty_like(x), "Meta")
    library.impl("quantized_moe_ffn.out", lambda *_, out: out, "Meta")
    return library


def _eager(x, gate, bias, w13, w2, top_k, n_experts, hidden, dim, group_size, bits, score, route_scale):
    return run_kernel(
        list_kernels()[0], x.contiguous(), gate, bias if bias.numel() else None, w13, w2,
        top_k=top_k, expert_hidden=hidden, group_size=group_size, route_scale=route_scale,
    )  # fmt: skip
