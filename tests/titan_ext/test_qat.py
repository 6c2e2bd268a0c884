"""Fake quantization against the formula written out here, and which modules it reaches."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

from core.errors import DamagedData
from titan_ext.config import FLAVORS
from titan_ext.cpu import kernels
from titan_ext.cpu.kernels import COMPILED_ELEMENTS
from titan_ext.mobilemoe import model_config
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import divide, round_scale, round_to_int4
from titan_ext.quantization.qat import (
    QATEmbedding,
    QATExperts,
    QATLinear,
    convert_to_qat,
    fake_quantize_activation,
    fake_quantize_weight,
)


def int4_by_hand(row: torch.Tensor, group_size: int) -> torch.Tensor:
    out = []
    for group in row.split(group_size):
        scale = (group.abs().max() / 7.5).bfloat16().half().float().clamp(min=2.0**-24)
        out.append((group * (1 / scale)).round().clamp(-8, 7) * scale)
    return torch.cat(out)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(-9, 3), rows=st.integers(1, 4), groups=st.integers(1, 3))
def test_weights_take_the_grid_of_the_paper(seed, magnitude, rows, groups):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 32 * groups, generator=generator) * 10**magnitude
    expected = torch.stack([int4_by_hand(row, 32) for row in weight])
    assert torch.equal(fake_quantize_weight(weight, 32), expected)
    # The other axis is the same thing transposed.
    assert torch.equal(fake_quantize_weight(weight.T.contiguous(), 32, axis=0), expected.T)
    # Half a step, and at the group's end 7.5 times the scale's own rounding to eight bits.
    assert (expected - weight).abs().max() <= weight.abs().max() / 7.5 * (0.5 + 7.5 / 256) + 2.0**-22


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(-3, 3))
def test_activations_are_rounded_a_token_at_a_time(seed, magnitude):
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    rounded = fake_quantize_activation(x)
    step = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)) / 255
    assert ((rounded - x).abs() <= step[:, None] * 0.51 + 1e-6).all()
    assert torch.equal(rounded[2:3], fake_quantize_activation(x[2:3])), "other tokens must not matter"
    assert all(len(row.unique()) <= 256 for row in rounded)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(-9, 6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_activations_take_the_grid_of_torchao(seed, magnitude, dtype):
    x = (torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) * 10**magnitude).to(dtype)
    x[0] = 0
    x[1] = x[1].abs()
    block_size, integers = (1, 48), {"quant_min": -128, "quant_max": 127}
    scale, zero_point = choose_qparams_affine(
        x.float(), MappingType.ASYMMETRIC, block_size, target_dtype=torch.int8, **integers, scale_dtype=torch.float32,
        zero_point_dtype=torch.int32,
    )  # fmt: skip
    q = quantize_affine(x.float(), block_size, scale, zero_point, torch.int8, **integers)
    expected = dequantize_affine(q, block_size, scale, zero_point, torch.int8, **integers)
    assert torch.equal(fake_quantize_activation(x), expected.to(dtype))


def test_no_tokens_are_rounded_to_none():
    x = torch.zeros(0, 48, requires_grad=True)
    fake_quantize_activation(x).sum().backward()
    assert x.grad.shape == (0, 48)


def test_scales_are_rounded_as_by_the_two_casts():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.empty(100_000).uniform_(-24, 15.9, generator=generator)
    powers, small = 2.0 ** torch.arange(-24.0, 16.0), torch.tensor([2.0**-24 * 1.5, 2.0**-15 * 1.01])
    scale = torch.cat([2.0**exponents, powers, small])
    assert torch.equal(round_scale(scale), scale.bfloat16().half().float())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: apt-get install g++")
@pytest.mark.parametrize("divisor", [7.5, 255])
def test_a_quotient_is_the_nearest_also_where_a_device_multiplies_by_the_reciprocal(divisor):
    """Every exponent of float32. A GPU multiplies; in float32 that gives another number for most values."""
    bits = torch.randint(0, 2**31 - 2**23, (1 << 20,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32)
    assert torch.equal(divide(x, divisor), x / divisor)
    assert torch.equal((x.double() * (1 / divisor)).float(), x / divisor)
    assert (x * torch.tensor(1 / divisor) != x / divisor).float().mean() > 0.3


def test_compiled_quantizers_take_the_same_grid():
    """Fusion leaves casts to bfloat16 and back out; the scales' rounding must not be among them."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.02
    compiled = torch.compile(fake_quantize_weight)
    expected = torch.stack([int4_by_hand(row, 32) for row in weight])
    assert torch.equal(compiled(weight, 32), expected)
    large = torch.randn(COMPILED_ELEMENTS // 1024 + 1, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(fake_quantize_weight(large, 32)[:64], fake_quantize_weight(large[:64], 32))
    assert torch.equal(fake_quantize_activation(large)[:64], fake_quantize_activation(large[:64]))


def test_the_gradient_goes_straight_through():
    weight = torch.randn(4, 64, requires_grad=True)
    upstream = torch.randn(4, 64)
    (fake_quantize_weight(weight, 32) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream), "also for the largest value of a group, which the grid clamps"


def test_every_matrix_but_the_router_is_quantized():
    model = convert_to_qat(model_config(FLAVORS["tiny"]), QuantizationConfig()).build()
    matrices = {name for name, p in model.named_parameters() if p.dim() >= 2}
    covered = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, (QATLinear, QATEmbedding, QATExperts))
        for name, _ in module.named_parameters(recurse=False)
    }
    assert matrices - covered == {f"layers.{i}.moe.router.gate.weight" for i in range(4)}


@pytest.mark.parametrize(("axis", "dim"), [("in", -1), ("out", -2)])
def test_experts_are_grouped_along_the_chosen_axis(axis, dim):
    torch.manual_seed(0)
    config = convert_to_qat(model_config(FLAVORS["tiny"]), QuantizationConfig(expert_group_axis=axis))
    model = config.build()
    model.init_states()
    experts = model.layers["0"].moe.routed_experts.inner_experts
    for plain, quantized in zip((experts.w1_EFD, experts.w2_EDF, experts.w3_EFD), experts.local_weights(), strict=True):
        groups = quantized.detach().movedim(dim, -1).unflatten(-1, (-1, 32))
        assert max(len(group.unique()) for group in groups.flatten(0, -2)[:200]) <= 16
        assert torch.equal(quantized, fake_quantize_weight(plain, 32, dim))


def test_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"48 values along axis -1 are no multiple of group_size 32"):
        fake_quantize_weight(torch.zeros(4, 48), 32)


def test_compiled_code_that_computes_something_else_is_refused(monkeypatch):
    """Code that was compiled for other vector instructions computed numbers of 1e28 without a word."""
    monkeypatch.setattr(torch, "compile", lambda function: lambda x, *args: function(x, *args) * (1 + 2e-7))
    fused = kernels.fuse_if_large(round_to_int4)
    large = torch.randn(COMPILED_ELEMENTS // 1024, 1024, generator=torch.Generator().manual_seed(1))
    with pytest.raises(
        DamagedData, match=r"compiled round_to_int4 differs .* in [\d,]+ of 1,048,576 values: .*inductor"
    ):
        fused(large, -1, 32)
    assert torch.equal(fused(large[:8], -1, 32), round_to_int4(large[:8], -1, 32)), "small tensors are not compiled"


def test_compiled_code_is_compared_on_the_first_shapes_alone(monkeypatch):
    calls = []

    def double(x):
        calls.append(x.shape)
        return x * 2

    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x * 2)
    fused = kernels.fuse_if_large(double)
    for rows in (1024, 1024, 1025, 1026, 1027, 1024):
        assert torch.equal(fused(torch.ones(rows, 1024)), torch.full((rows, 1024), 2.0))
    fused(torch.full((1024, 1024), float("nan")))
    fused(torch.ones(1024, 1024, dtype=torch.bfloat16))
    assert [shape[0] for shape in calls] == [1024, 1025, 1026, 1024]
