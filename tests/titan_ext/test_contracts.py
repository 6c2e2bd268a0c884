"""Undocumented behaviour of torch, torchtitan and torchao that titan_ext relies on, one small test each."""

import inspect
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.tools.utils as titan_utils
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from titan_ext.cpu import adaptations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_runs_on_the_cpu_with_idle_experts(dtype):
    torch.manual_seed(0)
    x_RD = torch.randn(24, 32, dtype=dtype, requires_grad=True)
    w_EFD = torch.randn(4, 16, 32, dtype=dtype, requires_grad=True)
    counts = [8, 0, 16, 0]
    out_RF = torch._grouped_mm(x_RD, w_EFD.transpose(-2, -1), offs=torch.tensor(counts).cumsum(0, dtype=torch.int32))
    loop_RF = torch.cat([x @ w.T for x, w in zip(x_RD.split(counts), w_EFD, strict=True)])
    torch.testing.assert_close(out_RF, loop_RF)
    upstream = torch.randn_like(out_RF)
    ours = torch.autograd.grad(out_RF, (x_RD, w_EFD), upstream)
    theirs = torch.autograd.grad(loop_RF, (x_RD, w_EFD), upstream)
    torch.testing.assert_close(ours, theirs)


def test_grouped_mm_has_no_backward_without_rows():
    w_EFD = torch.randn(2, 16, 32, requires_grad=True)
    out_RF = torch._grouped_mm(torch.zeros(0, 32), w_EFD.transpose(-2, -1), offs=torch.zeros(2, dtype=torch.int32))
    assert out_RF.shape == (0, 16)
    with pytest.raises(RuntimeError, match="Invalid strides"):
        out_RF.sum().backward()  # when this passes, Experts.forward can lose its special case


def test_symmetric_scale_is_a_fifteenth_of_the_span():
    weight = torch.tensor([[-3.0, 1.0, 0.5, 2.0]])
    scale, zero_point = choose_qparams_affine(
        weight, MappingType.SYMMETRIC, (1, 4), torch.int8, -8, 7, scale_dtype=torch.float32
    )
    assert scale.item() == pytest.approx(3.0 / 7.5)
    assert zero_point.item() == 0


@pytest.mark.skipif(not adaptations.IS_CPU, reason="an accelerator is present: torchtitan uses it as it is")
def test_torchtitan_was_imported_after_the_cpu_was_chosen():
    import titan_ext.mobilemoe  # noqa: F401

    # isort: split
    import torchtitan.components.metrics as metrics
    import torchtitan.distributed.utils as dist_utils

    assert titan_utils.device_type == metrics.device_type == dist_utils.device_type == "cpu"
    monitor = metrics.build_device_memory_monitor()
    assert monitor.device_index == 0
    assert monitor.device_capacity_gib > 0


def test_the_trainer_sleeps_at_its_end_and_nowhere_else():
    """`adaptations.TRAINER_CLOCK` stands in for all that it uses of `time`."""
    import titan_ext.training.trainer

    source = inspect.getsource(titan_ext.training.trainer.torchtitan.trainer)
    assert sorted(re.findall(r"\btime\.(\w+)\(", source)) == ["perf_counter", "perf_counter", "sleep"]
    assert source.index("time.sleep(") > source.index("self.validator.validate(")


@pytest.fixture
def process_group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not adaptations.IS_CPU, reason="an accelerator is present: FSDP2 reduces as it does")
def test_fsdp_reduces_with_nobody_in_one_block(process_group_of_one):
    """FSDP2 allocates a reduction's input, then its output, and divides by the factor in between if there is one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    expected = [p.detach().clone().requires_grad_() for p in model.parameters()]
    sharded = fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    sharded.set_gradient_divide_factor(1.0)  # as torchtitan does
    adaptations.adapt_reductions(sharded)
    whole = 4 * sum(p.numel() for p in expected)
    inputs = torch.randn(3, 16, 64, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for x in inputs:  # the second and third gradient are added to the first
            sharded(x).square().sum().backward()
    for x in inputs:
        w1, b1, w2, b2 = (p.bfloat16() for p in expected)
        F.linear(F.relu(F.linear(x, w1, b1)), w2, b2).square().sum().backward()
    for p, theirs in zip(sharded.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.to_local(), theirs.grad, rtol=0, atol=0)
    sizes = [event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sum(size >= whole for size in sizes) == len(inputs), "one block for the whole gradients of a backward pass"
