"""Private interfaces and undocumented behaviour of torch, torchtitan and torchao that titan_ext relies on.

One small test each; the docstring of a test says what breaks when it fails.
"""

import dataclasses
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.components.metrics as metrics
import torchtitan.distributed.utils as dist_utils
import torchtitan.tools.utils as titan_utils
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine
from torchtitan.components.optimizer import OptimizersContainer, default_adamw, register_moe_load_balancing_hook
from torchtitan.trainer import Trainer

from core.errors import RefusedInput
from titan_ext import compat
from titan_ext.config import FLAVORS
from titan_ext.cpu import fsdp
from titan_ext.cpu.device import IS_CPU
from titan_ext.mobilemoe import model_config
from titan_ext.training.optimizers import SkippableOptimizers


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


@pytest.mark.skipif(not IS_CPU, reason="an accelerator is present: torchtitan uses it as it is")
def test_no_torchtitan_module_holds_cuda():
    """A module that copies torchtitan's device under another name would train on "cuda": `use_cpu` must change it."""
    import titan_ext.training.train

    modules = {name: module for name, module in sys.modules.items() if name.startswith("torchtitan.")}
    assert "torchtitan.trainer" in modules and hasattr(titan_ext.training.train, "StageTrainer")
    holders = [
        f"{name}.{attribute}"
        for name, module in modules.items()
        for attribute, value in vars(module).items()
        if value is torch.cuda or (isinstance(value, str) and value.partition(":")[0] == "cuda")
    ]
    assert holders == []


@pytest.mark.skipif(not IS_CPU, reason="an accelerator is present: torchtitan uses it as it is")
def test_torchtitan_chooses_the_cpu():
    """The memory monitor gets the device as an argument: the default of that argument was "cuda:0" at import."""
    assert model_config  # importing its package calls `use_cpu`
    assert titan_utils.device_type == metrics.device_type == dist_utils.device_type == "cpu"
    monitor = metrics.build_device_memory_monitor()
    assert monitor.device_index == 0
    assert monitor.device_capacity_gib > 0


def test_the_trainer_calls_the_forward_backward_function_it_holds():
    """Distillation replaces `Trainer.fwd_bwd_fn`; otherwise the student would train without its teacher."""
    labels, tokens = torch.zeros(1, 2), torch.tensor(2)
    trainer = SimpleNamespace(
        model_parts=[None],
        parallel_dims=SimpleNamespace(pp_enabled=False),
        post_dataloading_process=lambda input_dict, labels: (input_dict["input"], labels, {"positions": None}),
        fwd_bwd_fn=lambda *args: args,
    )
    inputs = torch.ones(1, 2)
    called = Trainer.forward_backward_step(
        trainer, input_dict={"input": inputs}, labels=labels, global_valid_tokens=tokens
    )
    assert called == (inputs, labels, tokens, {"positions": None})


def test_torchtitan_leaves_the_expert_bias_without_tokens():
    """A skipped step sets the token counts to zero; the hook, which runs all the same, must not move the bias then."""
    moe = torch.nn.Module()
    moe.load_balance_coeff = 1e-3
    moe.register_buffer("tokens_per_expert_E", torch.tensor([5.0, 1.0, 0.0]))
    moe.register_buffer("expert_bias_E", torch.tensor([0.25, -0.5, 0.0]))
    block = torch.nn.Module()
    block.moe_enabled, block.moe, block.weight = True, moe, torch.nn.Parameter(torch.ones(3))
    part = torch.nn.Module()
    part.layers = torch.nn.ModuleDict({"0": block})
    optimizers = SkippableOptimizers.Config(param_groups=default_adamw().param_groups).build(model_parts=[part])
    dims = SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False)
    register_moe_load_balancing_hook(optimizers, [part], dims)
    optimizers.step()
    moved = moe.expert_bias_E.clone()
    assert moved[0] < 0.25 and not moe.tokens_per_expert_E.any(), "the hook takes effect and clears the counts"
    optimizers.step()
    assert torch.equal(moe.expert_bias_E, moved)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_a_held_out_pass_is_not_counted(capacity_factor):
    """torchtitan #4148: it would move the expert bias in the next step, and be part of the logged load."""
    dims = dataclasses.replace(FLAVORS["tiny"], n_layers=1)
    model = model_config(dims, capacity_factor=capacity_factor).build()
    model.init_states()
    tokens = torch.arange(32).view(1, 32)
    moe = model.layers["0"].moe
    counters = [moe.tokens_per_expert_E, moe.router.gate.token_sums]
    counters += [moe.routed_experts.num_dropped] if capacity_factor else []
    model.train()
    model(tokens)
    before = [counter.clone() for counter in counters]
    assert all(counter.any() for counter in before)
    model.eval()
    model(tokens)
    assert all(map(torch.equal, counters, before))


@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_step_hooks_run_once_whether_the_update_is_skipped_or_not(skip):
    """PyTorch wraps `step` of each class that is built once; a wrapped base class would run the hooks twice."""
    calls = []
    for config_class in (OptimizersContainer.Config, SkippableOptimizers.Config):
        model = torch.nn.Linear(2, 1)
        optimizers = config_class(param_groups=default_adamw(lr=0.1).param_groups).build(model_parts=[model])
    optimizers.register_step_pre_hook(lambda *args, **kwargs: calls.append(1))
    model(torch.ones(1, 2)).sum().backward()
    optimizers.step()
    kept = {name: x.clone() for name, x in optimizers.state_dict().items() if isinstance(x, torch.Tensor)}
    before = model.weight.detach().clone()
    optimizers.skip = None if skip is None else torch.tensor(skip)
    optimizers.step()
    after = optimizers.state_dict()
    assert calls == [1, 1]
    assert torch.equal(model.weight, before) == (skip == 1)
    moments = [name for name in kept if "exp_avg" in name or name.endswith("step")]
    assert len(moments) == 6 and all(torch.equal(kept[name], after[name]) == (skip == 1) for name in moments)


def test_a_nan_is_not_read_by_an_update_that_is_skipped():
    """When this fails, a step whose gradients are not finite destroys the weights before anybody looks."""
    model = torch.nn.Linear(2, 1)
    optimizers = SkippableOptimizers.Config(param_groups=default_adamw(lr=0.1).param_groups).build(model_parts=[model])
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.full((1, 2), torch.nan), torch.zeros(1)
    optimizers.skip = torch.tensor(1.0)
    optimizers.step()
    assert torch.equal(model.weight, before)
    state = optimizers.optimizers[0].state[model.weight]
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and state["step"] == 0


def test_optimizers_that_cannot_skip_are_refused():
    with pytest.raises(RefusedInput, match=r"optimizer\.implementation = foreach: .* choose fused"):
        SkippableOptimizers.Config(param_groups=default_adamw(lr=0.1).param_groups, implementation="foreach")


def test_the_trainer_clips_through_the_module_that_is_replaced():
    """When this fails, spikes are not skipped: StageTrainer's own clipping, which decides, is not called."""
    from torchtitan import trainer

    original = trainer.dist_utils.clip_grad_norm_
    with compat.clip_by(len):
        assert trainer.dist_utils.clip_grad_norm_ is len
    assert trainer.dist_utils.clip_grad_norm_ is original
    assert inspect.getsource(trainer.Trainer.train_step).count("dist_utils.clip_grad_norm_(") == 1


def test_a_decoder_returns_hidden_states_on_request():
    """The teacher's output projection is computed chunk by chunk; full logits would need gigabytes."""
    dims = dataclasses.replace(FLAVORS["tiny"], n_layers=1)
    model = model_config(dims).build()
    model.init_states()
    compat.return_hidden_states(model)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, dims.d_model)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_leaves_a_gathered_tensor_unfinished(mesh):
    """When this fails, `_copy_gathered_inputs` copies nothing, and routed experts may get no gradient."""
    gathered = all_gather_tensor(torch.ones(2), 0, mesh.get_group())
    unfinished = DTensor(
        gathered, DTensorSpec(mesh, (Replicate(),), TensorMeta(gathered.shape, gathered.stride(), gathered.dtype)),
        requires_grad=False,
    )  # fmt: skip
    assert compat.is_being_gathered(unfinished)
    assert not compat.is_being_gathered(unfinished.clone())
    assert not compat.is_being_gathered(torch.ones(2))


@pytest.mark.skipif(not IS_CPU, reason="an accelerator is present: FSDP2 reduces as it does")
def test_fsdp_reduces_with_nobody_in_one_block(mesh, monkeypatch):
    """FSDP2 allocates a reduction's input, then its output, and divides by the factor in between if there is one.

    Input, output and sharded gradients must be one block. Otherwise a training step copies all gradients again.
    """
    blocks = []

    class RecordingReduceScatter(fsdp.OneRankReduceScatter):
        def allocate(self, size, *, dtype, device):
            blocks.append(super().allocate(size, dtype=dtype, device=device))
            return blocks[-1]

    monkeypatch.setattr(fsdp, "OneRankReduceScatter", RecordingReduceScatter)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    expected = [p.detach().clone().requires_grad_() for p in model.parameters()]
    sharded = fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    sharded.set_gradient_divide_factor(1.0)  # as torchtitan does
    fsdp.adapt_reductions(sharded)
    inputs = torch.randn(3, 16, 64, dtype=torch.bfloat16)
    for i, x in enumerate(inputs):  # the second and third gradient are added to the first
        sharded(x).square().sum().backward()
        assert len(blocks) == 2 * (i + 1), "one input and one output a backward pass"
        assert blocks[-2].data_ptr() == blocks[-1].data_ptr()
        assert blocks[-1].numel() == sum(p.numel() for p in expected) and blocks[-1].dtype == torch.float32
    storages = {p.grad.to_local().untyped_storage().data_ptr() for p in sharded.parameters()}
    assert storages == {blocks[0].data_ptr()}, "gradients are views of the first block"
    for x in inputs:
        w1, b1, w2, b2 = (p.bfloat16() for p in expected)
        F.linear(F.relu(F.linear(x, w1, b1)), w2, b2).square().sum().backward()
    for p, theirs in zip(sharded.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.to_local(), theirs.grad, rtol=0, atol=0)


def test_fsdp_reduces_alone_only_without_replicas_and_other_shards(mesh):
    """A replicated model (HSDP) still has to be reduced over its replicas, also where a replica is one rank."""
    replicated = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp_replicate", "fsdp"))
    for over, alone in ((mesh, True), (replicated, False)):
        (group,) = compat.get_param_groups(fully_shard(torch.nn.Linear(4, 4), mesh=over))
        assert compat.reduces_on_one_rank(group) == alone


def test_fsdp_gathers_moved_groups_with_their_new_unit(mesh):
    """The router's weight stays float32 without a unit, and so without hooks, of its own."""
    block = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    full_weight = block[0].weight.detach().clone()
    fully_shard(block[0], mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.float32, torch.float32))
    fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    compat.move_param_groups(block[0], block)
    fsdp.adapt_reductions(block)
    assert [len(compat.get_param_groups(unit)) for unit in (block[0], block)] == [0, 2]
    assert not block[0]._forward_pre_hooks and not block[0]._forward_hooks
    seen = []

    def watch_weight(x: torch.Tensor) -> torch.Tensor:
        weight = block[0].weight
        seen.append((weight.dtype, torch.equal(weight.detach(), full_weight)))
        return F.linear(x.float(), weight).bfloat16()

    block[0].forward = watch_weight
    block(torch.ones(2, 4)).sum().backward()
    assert seen == [(torch.float32, True)]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())
