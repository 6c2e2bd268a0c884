"""Our MoE op: its three kernels against float64 and each other, in ExecuTorch's runtime, and where no compiler is."""

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from core.errors import DamagedData
from eval.compat import register_executorch_ops, set_executorch_threads
from eval.device import expert_op
from tests.eval.moe_reference import RandomExperts
from titan_ext.quantization.formulas import quantize_int8, round_to_int8
from titan_ext.quantization.qat import fake_quantize_activation

AVAILABLE = expert_op.list_kernels()
FASTEST = AVAILABLE[0]


def run(layer: RandomExperts, kernel: str) -> torch.Tensor:
    top_k, _, hidden, _, group_size = layer.sizes
    return expert_op.run_kernel(
        kernel, layer.x, layer.gate, layer.bias, *layer.packed,
        top_k=top_k, expert_hidden=hidden, group_size=group_size, route_scale=2.5,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    """Set the size of ExecuTorch's pool."""
    set_executorch_threads(request.param)


@pytest.mark.parametrize("kernel", AVAILABLE)
@pytest.mark.parametrize("n_tokens", [1, 7, 20])
def test_kernels_compute_the_layer_on_int8_activations(kernel, n_tokens):
    """float32 sums against float64: an activation on the edge of two INT8 values may fall to the other."""
    layer = RandomExperts(n_tokens=n_tokens, seed=n_tokens)
    expected = layer.reference(int8_activations=True)
    assert (run(layer, kernel) - expected).norm() < 2e-3 * expected.norm()
    assert (run(layer, kernel) - expected).abs().median() < 1e-6 * expected.abs().max()


@settings(max_examples=12)
@given(
    d_groups=st.integers(1, 5), hidden_groups=st.integers(1, 4), group_size=st.sampled_from([32, 64, 96, 128]),
    n_experts=st.integers(1, 9), n_tokens=st.integers(1, 9), use_bias=st.booleans(), data=st.data(),
)  # fmt: skip
def test_kernels_agree_at_any_size(d_groups, hidden_groups, group_size, n_experts, n_tokens, use_bias, data):
    layer = RandomExperts(
        n_tokens=n_tokens, d_model=d_groups * group_size, hidden=hidden_groups * group_size, n_experts=n_experts,
        top_k=data.draw(st.integers(1, n_experts)), group_size=group_size, use_bias=use_bias,
    )  # fmt: skip
    portable = run(layer, "portable")
    expected = layer.reference(int8_activations=True)
    assert (portable - expected).norm() < 5e-3 * expected.norm()
    for kernel in AVAILABLE:
        assert (run(layer, kernel) - portable).norm() < 5e-3 * expected.norm()


TINY_RANGES = (1e-6, 1e-7, 1e-12, 1e-20, 1e-30)


@pytest.mark.parametrize("size", TINY_RANGES)
def test_tokens_of_a_tiny_range_are_rounded_alike(size):
    """Training's formula and torchao's on tokens whose whole range is below what float32 resolves beside 1."""
    x = size * torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    x[0], x[1] = 0, x[1].abs()
    block_size, integers = (1, 128), {"quant_min": -128, "quant_max": 127}
    scale, zero_point = choose_qparams_affine(
        x, MappingType.ASYMMETRIC, block_size, target_dtype=torch.int8, **integers, scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )  # fmt: skip
    q = quantize_affine(x, block_size, scale, zero_point, torch.int8, **integers)
    own_q, own_scale, own_zero_point = quantize_int8(x)
    assert torch.equal(own_scale[:, 0], scale) and torch.equal(own_zero_point[:, 0].int(), zero_point)
    assert torch.equal(own_q.to(torch.int8), q)
    rounded = dequantize_affine(q, block_size, scale, zero_point, torch.int8, **integers)
    assert torch.equal(fake_quantize_activation(x), rounded) and torch.equal(round_to_int8(x), rounded)
    assert ((rounded - x).abs() <= 0.51 * scale[:, None]).all() and len(rounded[2].unique()) > 60


@pytest.mark.parametrize("kernel", AVAILABLE)
@pytest.mark.parametrize("size", [size for size in TINY_RANGES if size > 1e-25])  # smaller ones give 0 in float32
def test_kernels_round_tokens_of_a_tiny_range_as_training_does(kernel, size):
    """Large weights keep the squares of the products, SwiGLU's, in float32's range."""
    layer = RandomExperts(n_tokens=7, input_size=size, weight_gain=2.0**14, seed=3)
    expected = layer.reference(int8_activations=True)
    assert expected.abs().max() > 1e-30
    assert (run(layer, kernel) - expected).norm() < 2e-3 * expected.norm()
    assert (run(layer, kernel) - expected).abs().median() < 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kernel", AVAILABLE)
def test_kernels_round_a_tiny_hidden_state_as_training_does(kernel):
    """The second rounding, in front of the down products: gate and up weights shrink small tokens further."""
    layer = RandomExperts(n_tokens=7, input_size=1e-4, weight_gain=2.0**-8, seed=4)
    expected = layer.reference(int8_activations=True)
    assert 0 < expected.abs().max() < 1e-9
    assert (run(layer, kernel) - expected).norm() < 2e-3 * expected.norm()


def test_extreme_values_do_not_overflow():
    """Weights of 7 and -8 throughout, activations at both ends of their range: the largest sums there can be."""
    layer = RandomExperts(n_tokens=2, d_model=2048, hidden=128, group_size=128)
    layer.x = torch.full_like(layer.x, 100.0)
    layer.x[1, ::2] = -100.0
    expected = layer.reference(int8_activations=True)
    for kernel in AVAILABLE:
        assert (run(layer, kernel) - expected).norm() < 1e-3 * expected.norm()


def test_int8_activations_stay_close_to_the_stock_op():
    """The stock op on x86 leaves activations in float: 20 dB is what INT8 must not lose."""
    register_executorch_ops()
    layer = RandomExperts(n_tokens=16, d_model=256, hidden=128)
    stock = torch.ops.llama.quantized_moe_ffn(*layer.op_arguments(stock=True))
    noise = run(layer, FASTEST) - stock
    assert 20 * torch.log10(stock.norm() / noise.norm()) > 30


def test_nan_input_gives_nan_and_no_crash():
    layer = RandomExperts()
    layer.x[0, 0] = float("nan")
    for kernel in AVAILABLE:
        assert run(layer, kernel).shape == layer.x.shape


def test_a_kernel_the_processor_lacks_is_refused():
    with pytest.raises(ValueError, match="does not have the kernel 'neon'"):
        run(RandomExperts(), "neon")


WRONG_LAYERS = {
    "x of another width": ({"x": torch.zeros(5, 96)}, "gate is torch.float32"),
    "x of one dimension": ({"x": torch.zeros(128)}, "give [T, D] and [E, D]"),
    "x of float64": ({"x": torch.zeros(5, 128).double()}, "x is torch.float64 [5, 128]"),
    "x that is not contiguous": ({"x": torch.zeros(128, 5).T}, "x is not contiguous"),
    "gate of fewer experts": ({"gate": torch.zeros(7, 128)}, "packed_w13 is torch.uint8 [8,"),
    "gate of bfloat16": ({"gate": torch.zeros(8, 128).bfloat16()}, "gate is torch.bfloat16"),
    "bias of another number": ({"bias": torch.zeros(9)}, "bias is torch.float32 [9]"),
    "more experts a token than there are": ({"top_k": 9}, "top_k is 9: give 1 to 8"),
    "no expert a token": ({"top_k": 0}, "top_k is 0: give 1 to 8"),
    "negative experts a token": ({"top_k": -1}, "top_k is -1"),
    "another hidden width": ({"hidden": 96}, "packed_w13 is torch.uint8"),
    "no hidden width": ({"hidden": 0}, "hidden_dim is 0"),
    "negative hidden width": ({"hidden": -64}, "hidden_dim is -64"),
    "another group": ({"group_size": 64}, "packed_w13 is torch.uint8"),
    "no group": ({"group_size": 0}, "group_size is 0"),
    "negative group": ({"group_size": -32}, "group_size is -32"),
    "group of half a tile": ({"group_size": 16}, "group_size is 16"),
    "weights cut off": ({"cut": True}, "packed_w2 is torch.uint8"),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
def test_a_layer_that_does_not_fit_is_refused(case):
    """The library gets bare pointers, and would read and write beyond them."""
    changed, message = WRONG_LAYERS[case]
    layer = RandomExperts()
    top_k, n_experts, hidden, d_model, group_size = layer.sizes
    for name in ("x", "gate", "bias"):
        setattr(layer, name, changed.get(name, getattr(layer, name)))
    layer.sizes = (
        changed.get("top_k", top_k), n_experts, changed.get("hidden", hidden), d_model,
        changed.get("group_size", group_size),
    )  # fmt: skip
    if changed.get("cut"):
        layer.packed = layer.packed[0], layer.packed[1][:, :-1].contiguous()
    with pytest.raises(ValueError) as caught:
        run(layer, FASTEST)
    assert message in str(caught.value)


def test_no_tokens_give_no_outputs():
    for kernel in AVAILABLE:
        assert run(RandomExperts(n_tokens=0), kernel).shape == (0, 128)


class OneLayer(torch.nn.Module):
    def __init__(self, layer: RandomExperts):
        super().__init__()
        _, *tensors = layer.op_arguments()
        self.sizes = tensors[4:]
        for name, tensor in zip(("gate", "bias", "w13", "w2"), tensors, strict=False):
            self.register_buffer(name, tensor)

    def forward(self, x):
        return torch.ops.mobilemoe.quantized_moe_ffn(x, self.gate, self.bias, self.w13, self.w2, *self.sizes)


def test_executorchs_runtime_calls_it(tmp_path):
    expert_op.declare()
    layer = RandomExperts(n_tokens=6)
    shapes = ({0: torch.export.Dim("tokens", max=64)},)
    program = torch.export.export(OneLayer(layer), (layer.x,), dynamic_shapes=shapes)
    edge = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    path = tmp_path / "layer.pte"
    path.write_bytes(edge.to_executorch().buffer)
    read = expert_op.load().mobilemoe_experts_read()
    out = Runtime.get().load_program(path).load_method("forward").execute([layer.x])[0]
    assert torch.equal(out, run(layer, FASTEST))
    assert 3 <= (expert_op.load().mobilemoe_experts_read() - read) / 2 <= 8


WRONG_PROGRAMS = {
    "more experts a token than there are": lambda layer: layer.sizes.__setitem__(0, 9),
    "no expert a token": lambda layer: layer.sizes.__setitem__(0, 0),
    "negative hidden width": lambda layer: layer.sizes.__setitem__(2, -64),
    "a width beyond all bounds": lambda layer: layer.sizes.__setitem__(2, 2**60),
    "no group": lambda layer: layer.sizes.__setitem__(4, 0),
    "negative group": lambda layer: layer.sizes.__setitem__(4, -32),
    "gate of float64": lambda layer: setattr(layer, "gate", layer.gate.double()),
    "bias of integers": lambda layer: setattr(layer, "bias", layer.bias.int()),
    "weights of int8": lambda layer: setattr(layer, "w13", layer.w13.view(torch.int8)),
    "weights cut off": lambda layer: setattr(layer, "w2", layer.w2[:, :-1].contiguous()),
}


@pytest.mark.parametrize("case", WRONG_PROGRAMS)
def test_executorchs_runtime_refuses_a_layer_that_does_not_fit(case, tmp_path, threads):
    """A program of another exporter may hold anything; the runtime hands its pointers over."""
    expert_op.declare()
    expert_op.load()
    model = OneLayer(RandomExperts())
    model.sizes = list(model.sizes)
    WRONG_PROGRAMS[case](model)
    program = torch.export.export(model, (torch.zeros(5, 128),))
    edge = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    method = Runtime.get().load_program(edge.to_executorch().buffer).load_method("forward")
    with pytest.raises(RuntimeError, match="0x12"):
        method.execute([torch.zeros(5, 128)])


def test_without_a_compiler_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILEMOE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"no C\+\+ compiler.*--expert-op stock"):
        expert_op.library_path()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("MOBILEMOE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ValueError, match="could not build the fast expert op"):
        expert_op.library_path()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(FASTEST == "portable", reason="the processor has no vector kernel to compare")
def test_a_library_that_computes_something_else_is_refused_when_it_is_loaded(monkeypatch):
    """A cached library may have been made for another machine, or be damaged."""
    real = expert_op.run_kernel

    def call(kernel, *layer, **sizes):
        result = real(kernel, *layer, **sizes)
        return result if kernel == "portable" else result * 1.1

    expert_op.compare_kernels(expert_op.load(), expert_op.library_path())
    monkeypatch.setattr(expert_op, "run_kernel", call)
    with pytest.raises(DamagedData, match="computes something else than the portable one; remove the folder"):
        expert_op.compare_kernels(expert_op.load(), expert_op.library_path())
