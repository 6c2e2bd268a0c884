"""Undocumented behaviour of torch, torchtitan and torchao that titan_ext relies on, one small test each."""

import inspect
import re

import pytest
import torch
import torchtitan.tools.utils as titan_utils
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

from titan_ext import cpu


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


@pytest.mark.skipif(not cpu.IS_CPU, reason="an accelerator is present: torchtitan uses it as it is")
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
    """`cpu.TRAINER_CLOCK` stands in for all that it uses of `time`."""
    import titan_ext.trainer

    source = inspect.getsource(titan_ext.trainer.torchtitan.trainer)
    assert sorted(re.findall(r"\btime\.(\w+)\(", source)) == ["perf_counter", "perf_counter", "sleep"]
    assert source.index("time.sleep(") > source.index("self.validator.validate(")
