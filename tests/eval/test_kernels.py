"""These tests run the tile kernels of every instruction set without ExecuTorch, on this processor and on emulated ARM.

Sums of integers must be exact. Scales are powers of two and sums stay below 2^24, so float32 holds them exactly too.
"""

import functools
import platform
import shutil
import signal
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from eval.device import expert_op
from eval.device.compiler import compile_file
from eval.device.expert_blobs import HEADER, TILE_ROWS, pack_blobs
from tests.eval.moe_reference import RandomExperts
from tests.runtimes import RUNTIMES, SCRIPTS, require_runtime

RUNNER = Path(__file__).with_name("run_kernels.cpp")
KERNELS = {
    "native": {"x86_64": ["avx512_vnni", "avx2", "portable"], "aarch64": ["neon_i8mm", "neon_dot", "portable"]}[
        platform.machine()
    ],
    "max": ["neon_i8mm", "neon_dot", "portable"],
    "cortex-a76": ["neon_dot", "portable"],
    "cortex-a53": ["portable"],
}
"""Processor that qemu emulates, or this one -> kernels that it has (of this one: may have), the fastest first."""
ON = [(processor, kernel) for processor, kernels in KERNELS.items() for kernel in kernels]


@functools.cache
def find_missing(processor: str) -> list[str]:
    needed = ["g++"] if processor == "native" else ["aarch64-linux-gnu-g++", "qemu-aarch64"]
    return [program for program in needed if shutil.which(program) is None]


def skip_without_tools(processor: str) -> None:
    if missing := find_missing(processor):
        pytest.skip(f"no {' and no '.join(missing)}: apt-get install g++ qemu-user g++-aarch64-linux-gnu")


class Runner:
    """The program of run_kernels.cpp for one processor."""

    def __init__(self, program: Path, processor: str, *options: str):
        self.program, self.processor = program, processor
        emulator = [] if processor == "native" else ["qemu-aarch64", "-cpu", processor, *options]
        self.command = [*emulator, str(program)]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [*self.command, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    def compute(self, mode: str, kernel: str, cases: list[list[torch.Tensor]], folder: Path) -> torch.Tensor | None:
        """Return the kernel's outputs on all cases, one after the other; None if it left the memory it was given.

        Skips where this processor lacks the kernel.
        """
        if self.processor == "native" and kernel not in self("list").stdout.split():
            pytest.skip(f"this processor does not have {kernel}")
        numbers = b"".join(tensor.contiguous().numpy().tobytes() for case in cases for tensor in case)
        (folder / "cases").write_bytes(numbers)
        done = self(mode, kernel, str(folder / "cases"), str(folder / "out"))
        if done.returncode == -signal.SIGSEGV:
            return None
        assert done.returncode == 0, (done.returncode, done.stderr)
        return torch.frombuffer(bytearray((folder / "out").read_bytes()), dtype=torch.float32)


def build_runner(folder: Path, processor: str, sources: Path) -> Runner:
    skip_without_tools(processor)
    compiler = "g++" if processor == "native" else "aarch64-linux-gnu-g++ -static"
    flags = [*expert_op.ARITHMETIC_FLAGS, f"-I{sources}", str(RUNNER)]
    compile_file(compiler, flags, folder / "run_kernels", what="the test's program", advice="install one")
    return Runner(folder / "run_kernels", processor)


@pytest.fixture(scope="module")
def runners(tmp_path_factory):
    """Processor -> its runner; all emulated ones share a program, which is compiled when it is first wanted."""

    @functools.cache
    def build(native: bool) -> Runner:
        sources = expert_op.SOURCES[0].parent
        return build_runner(tmp_path_factory.mktemp("kernels"), "native" if native else "max", sources)

    return lambda processor: Runner(build(processor == "native").program, processor)


def make_tile(n_rows: int, group_size: int, n_groups: int, *, extreme: bool, exact: bool, seed: int):
    """Return a case for `run_kernels tiles`, its expected products in float64, and the sum of their terms' sizes.

    Args:
        extreme: weights and activations are at the ends of their ranges, so that sums are as large as they can be.
        exact: scales are small powers of two.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    k = n_groups * group_size
    weights = torch.where(draw(0, 1, TILE_ROWS, k) > 0, 7, -8) if extreme else draw(-8, 7, TILE_ROWS, k)
    q = draw(-128, 127, n_rows, k)
    zeros = draw(-128, 127, n_rows)
    if extreme:
        weights[0], weights[5] = 7, -8
        q[::2], q[1::2], zeros[::2], zeros[1::2] = 127, -128, -128, 127
    if exact:
        scales, row_scales = (2.0 ** draw(0, 2, TILE_ROWS, n_groups)), 2.0 ** draw(-3, 3, n_rows)
    else:
        scales = (torch.rand(TILE_ROWS, n_groups, generator=generator) + 0.01).half()
        row_scales = torch.rand(n_rows, generator=generator) + 0.01
    tile = pack_blobs(weights[None].to(torch.int8), scales[None])[0, 4 * len(HEADER) :]
    sums = q.view(n_rows, n_groups, group_size).sum(-1)
    sizes = torch.tensor([k, group_size, n_rows])
    case = [sizes, tile, q.to(torch.int8), sums.int(), row_scales.float(), zeros.int()]
    scaled_w = weights.double() * scales.double().repeat_interleave(group_size, 1)
    scaled_q = (q - zeros[:, None]).double() * row_scales.double()[:, None]
    return case, (scaled_q @ scaled_w.T).flatten(), (scaled_q.abs() @ scaled_w.abs().T).flatten()


@functools.cache
def make_tiles(*, exact: bool):
    shapes = [(n, g, m) for g in (32, 64, 96, 128, 256) for m in (1, 2, 5) for n in (1, 2, 3, 4, 5, 6, 7, 8, 13)]
    made = [
        make_tile(*shape, extreme=extreme, exact=exact, seed=seed)
        for extreme in (False, True)
        for seed, shape in enumerate(shapes)
    ]
    cases, expected, sizes = zip(*made, strict=True)
    return list(cases), torch.cat(expected), torch.cat(sizes)


@pytest.mark.parametrize("processor", [name for name in KERNELS if name != "native"])
def test_the_fastest_kernels_are_chosen_by_what_the_processor_has(runners, processor):
    assert runners(processor)("list").stdout.split() == KERNELS[processor]


@pytest.mark.parametrize(("processor", "kernel"), ON)
def test_sums_of_integers_are_exact(runners, processor, kernel, tmp_path):
    cases, expected, _ = make_tiles(exact=True)
    assert (expected == expected.float().double()).all() and expected.abs().max() > 2**24
    found = runners(processor).compute("tiles", kernel, cases, tmp_path)
    assert found is not None and torch.equal(found.double(), expected)


@pytest.mark.parametrize(("processor", "kernel"), ON)
def test_products_with_any_scales(runners, processor, kernel, tmp_path):
    cases, expected, sizes = make_tiles(exact=False)
    found = runners(processor).compute("tiles", kernel, cases, tmp_path)
    assert ((found.double() - expected).abs() / sizes).max() < 1e-6


LAYERS = (
    {"n_tokens": 1, "seed": 1},
    {"n_tokens": 7, "seed": 2, "n_experts": 3, "top_k": 1},
    {"n_tokens": 20, "seed": 3, "d_model": 192, "hidden": 96, "n_experts": 5, "top_k": 5},
    {"n_tokens": 9, "seed": 4, "d_model": 128, "hidden": 128, "group_size": 64},
    {"n_tokens": 6, "seed": 5, "d_model": 256, "hidden": 128, "group_size": 128},
    {"n_tokens": 7, "seed": 6, "input_size": 1e-20, "weight_gain": 2.0**14},
    {"n_tokens": 7, "seed": 7, "input_size": 1e-4, "weight_gain": 2.0**-8},
)


@functools.cache
def make_layers() -> tuple[list[RandomExperts], list[list[torch.Tensor]]]:
    """Return layers, and the cases of them for `layers`."""
    layers = [RandomExperts(**options) for options in LAYERS]
    cases = []
    for layer in layers:
        top_k, n_experts, hidden, d_model, group_size = layer.sizes
        sizes = torch.tensor([len(layer.x), d_model, hidden, n_experts, top_k, group_size])
        cases.append([sizes, layer.x, layer.gate, layer.bias, *layer.packed])
    return layers, cases


def check_layers(runner: Runner, kernel: str, folder: Path) -> None:
    layers, cases = make_layers()
    found = runner.compute("layers", kernel, cases, folder)
    assert found is not None
    for layer, out in zip(layers, found.split([layer.x.numel() for layer in layers]), strict=True):
        expected = layer.reference(int8_activations=True)
        error = out.view_as(layer.x) - expected
        assert error.norm() < 2e-3 * expected.norm()
        assert error.abs().median() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize(("processor", "kernel"), ON)
def test_layers_within_the_tolerance_of_the_op(runners, processor, kernel, tmp_path):
    """The tolerance of test_device_op.py: an activation on the edge of two INT8 values may fall to the other."""
    check_layers(runners(processor), kernel, tmp_path)


@pytest.fixture(scope="module")
def op_for_arm(tmp_path_factory):
    """Processor -> runner of the op's library, compiled against ExecuTorch's wheel for ARM."""
    require_runtime("executorch_aarch64")
    skip_without_tools("max")
    folder, wheel = tmp_path_factory.mktemp("op"), RUNTIMES / "executorch_aarch64/executorch"
    compiler, advice = "aarch64-linux-gnu-g++", "install one"
    compile_file(compiler, expert_op.list_arguments(wheel), folder / "libop.so", what="the op", advice=advice)
    caller = [str(RUNNER.with_name("call_op.cpp")), f"-I{expert_op.SOURCES[0].parent}", "-ldl"]
    compile_file(compiler, ["-std=c++17", "-O1", *caller], folder / "call_op", what="its caller", advice=advice)

    def open_op(processor: str) -> Runner:
        # The pool of threads comes from the wheel; the emulator finds Debian's C library below its root.
        where = ["-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={wheel / 'lib'}"]
        runner = Runner(folder / "call_op", processor, *where)
        runner.command.append(str(folder / "libop.so"))
        return runner

    return open_op


def test_the_wheel_for_arm_is_of_the_version_of_this_environment():
    pins = (SCRIPTS / "executorch_aarch64.txt").read_text()
    assert f"executorch=={version('executorch')}\n" in pins


@pytest.mark.parametrize("processor", [name for name in KERNELS if name != "native"])
def test_the_op_computes_layers_with_executorchs_libraries_for_arm(op_for_arm, processor, tmp_path):
    assert op_for_arm(processor)("list").stdout.strip().split(",") == KERNELS[processor]
    check_layers(op_for_arm(processor), KERNELS[processor][0], tmp_path)


FAULTS = {
    "the high nibbles are read as low ones": ("vshrq_n_u8(second, 4)", "vandq_u8(second, nibble)", "neon_dot"),
    "rows 4-7 take the sums of rows 0-3": ("row_sums + 16 * half", "row_sums", "neon_dot"),
    "rows 4-7 take the scales of rows 0-3": ("vget_high_u16(halves)", "vget_low_u16(halves)", "neon_dot"),
    "every group takes the first one's scales": ("scales_at += kScaleBytes;", "", "neon_dot"),
    "every group takes the first one's sum": ("row.group_sums[g]", "row.group_sums[0]", "neon_i8mm"),
    "the zero point is left out": ("static_cast<float>(row.zero)", "0.0f", "neon_i8mm"),
    "a row is paired with itself": ("vld1_s8(next_q)", "vld1_s8(q)", "neon_i8mm"),
    "a pair's second row takes the first one's": ("vzip2q_s64(sums[2]", "vzip1q_s64(sums[2]", "neon_i8mm"),
    "the odd last row is forgotten": ("if (i < n_rows)", "if (i + 1 < n_rows)", "neon_i8mm"),
    "32 values too many are read": ("n_steps = group_size / 32;", "n_steps = group_size / 32 + 1;", "neon_i8mm"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(fault, tmp_path):
    """A kernel with a mistake in it gives other numbers, or leaves its memory: the tests above would fail."""
    right, wrong, kernel = FAULTS[fault]
    sources = tmp_path / "sources"
    shutil.copytree(expert_op.SOURCES[0].parent, sources, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (sources / "tile_neon.h").read_text()
    assert right in text
    (sources / "tile_neon.h").write_text(text.replace(right, wrong))
    runner = build_runner(tmp_path, "max", sources)
    cases, expected, _ = make_tiles(exact=True)
    found = runner.compute("tiles", kernel, cases, tmp_path)
    assert found is None or not torch.equal(found.double(), expected)
