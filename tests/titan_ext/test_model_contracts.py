"""Private interfaces of torch and torchtitan that the model uses through titan_ext.compat, one small test each."""

import datetime
import inspect
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchtitan.trainer
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.titan_ext.test_model import DIMS
from titan_ext import compat
from titan_ext.cpu.device import IS_CPU
from titan_ext.mobilemoe import model_config
from titan_ext.mobilemoe.capacity_dispatch import CapacityTokenDispatcher
from titan_ext.mobilemoe.expert_bias import register_expert_bias_update
from titan_ext.mobilemoe.moe import Experts, RouterGate


@pytest.fixture
def mesh_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not IS_CPU, reason="an accelerator is present: gloo exchanges small numbers only")
def test_gloo_groups_have_one_worker_thread_and_keep_the_other_options(mesh_of_one: DeviceMesh):
    """When this fails, a rank may die of SIGSEGV: two workers of a group write one string without a lock."""
    patient = datetime.timedelta(seconds=77)
    for group in (dist.group.WORLD, mesh_of_one.get_group(), dist.new_group(backend="gloo", timeout=patient)):
        options = group._get_backend(torch.device("cpu")).options
        assert options._threads == 1 and len(options._devices) == 1
    assert options._timeout == patient and options.global_ranks_in_group == [0]
    assert options.group_name not in ("", dist.group.WORLD._get_backend(torch.device("cpu")).options.group_name)


@pytest.mark.skipif(not IS_CPU, reason="an accelerator is present: gloo exchanges small numbers only")
def test_a_gloo_group_listens_on_the_interfaces_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,no-such-interface")
    with pytest.raises(RuntimeError, match="no-such-interface"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()


def test_gathered_tensors_stand_side_by_side_and_pass_gradients_back(mesh_of_one: DeviceMesh):
    """When this fails, attention under context parallelism on the CPU is wrong."""
    x_BLD = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.equal(compat.all_gather_tensor(x_BLD.detach(), 1, mesh_of_one), x_BLD)
    gathered_BLD = compat.all_gather_tensor_autograd(x_BLD, 1, mesh_of_one)
    upstream_BLD = torch.randn(2, 3, 4)
    (gradient_BLD,) = torch.autograd.grad((gathered_BLD * upstream_BLD).sum(), x_BLD)
    assert torch.equal(gathered_BLD, x_BLD) and torch.equal(gradient_BLD, upstream_BLD)


def test_the_dispatchers_exchange_takes_split_sizes_and_passes_gradients_back(mesh_of_one: DeviceMesh):
    """When this fails, dispatch over expert parallelism (`token_dispatch`, `capacity_dispatch`) is wrong."""
    dispatcher = CapacityTokenDispatcher.Config(num_experts=2, top_k=1, capacity_factor=1.0).build()
    dispatcher.ep_mesh = mesh_of_one
    group = mesh_of_one.get_group()
    rows_RD = torch.randn(4, 3, requires_grad=True)
    arriving_E, sent, arriving = compat.exchange_counts(dispatcher, torch.tensor([1, 3]), group, 1)
    assert (arriving_E.tolist(), sent, arriving) == ([1, 3], [4], [4])
    sent_RD = compat.send_rows_to_experts(dispatcher, rows_RD, group, sent, arriving)
    back_RD = compat.return_rows_to_tokens(dispatcher, sent_RD, group, sent, arriving)
    assert torch.equal(sent_RD, rows_RD) and torch.equal(back_RD, rows_RD)
    (gradient_RD,) = torch.autograd.grad((back_RD * 3).sum(), rows_RD)
    assert torch.equal(gradient_RD, torch.full((4, 3), 3.0))


def test_another_shard_is_gathered_and_the_parameter_keeps_its_own_values(mesh_of_one: DeviceMesh):
    """When this fails, QAT trains weights that are not rounded, or checkpoints hold rounded ones."""
    layer = torch.nn.Linear(4, 2, bias=False)
    fully_shard(layer, mesh=mesh_of_one, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    master = layer.weight.to_local().detach().clone()
    (group,) = compat.get_param_groups(layer)
    (parameter,) = group.fsdp_params
    compat.start_groups([group])
    assert compat.get_owners(parameter) == [(layer, "weight")]
    assert parameter.param_dtype == torch.bfloat16 and parameter.padded_sharded_param_size == (2, 4)
    compat.gather_instead(parameter, torch.full((2, 4), 3.0, dtype=torch.bfloat16))
    x = torch.randn(5, 4).bfloat16()
    for _ in range(2):  # it holds for later passes too
        out = layer(x)
        assert torch.equal(out, x @ torch.full((4, 2), 3.0, dtype=torch.bfloat16))
        out.sum().backward()
    assert torch.equal(layer.weight.to_local(), master) and layer.weight.grad.to_local().abs().sum() > 0
    assert torch.equal(layer.state_dict()["weight"].to_local(), master)


def test_grouped_products_take_the_ends_of_the_groups():
    """When this fails, every expert computes with another expert's rows or weights."""
    torch.manual_seed(0)
    experts = Experts.Config(dim=16, hidden_dim=32, num_experts=3).build()
    x_RD, w_EDF = torch.randn(12, 16), torch.randn(3, 16, 32)
    counts = [4, 0, 8]
    out_RF = compat.multiply_grouped(experts, x_RD, w_EDF, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    torch.testing.assert_close(out_RF, torch.cat([x @ w for x, w in zip(x_RD.split(counts), w_EDF, strict=True)]))


def test_init_states_makes_the_buffers_of_a_model_from_the_meta_device():
    """When this fails, `_init_self_buffers` is not called, and metrics count from uninitialized memory."""
    with torch.device("meta"):
        gate = RouterGate.Config(in_features=4, out_features=2, param_init={"weight": torch.nn.init.zeros_}).build()
    gate.to_empty(device="cpu")
    gate.token_sums.fill_(torch.nan)
    gate.init_states(buffer_device=torch.device("cpu"))
    assert torch.equal(gate.token_sums, torch.zeros(3))


def test_the_expert_bias_moves_against_the_load_and_the_counts_are_cleared():
    """When this fails, titan_ext.mobilemoe.expert_bias describes another update than torchtitan does."""
    model = model_config(DIMS, expert_bias_update_rate=0.5).build()
    model.init_states()
    hooks = []
    optimizers = SimpleNamespace(register_step_pre_hook=hooks.append)
    one_rank = SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp_enabled=False)
    register_expert_bias_update(optimizers, [model], one_rank)
    moe = model.layers["0"].moe
    moe.tokens_per_expert_E.copy_(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1]))  # mean 2
    (update,) = hooks
    update()
    delta_E = 0.5 * torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])
    torch.testing.assert_close(moe.expert_bias_E, delta_E - delta_E.mean())
    assert not moe.tokens_per_expert_E.any()
    assert not model.layers["1"].moe.expert_bias_E.any(), "a layer whose load is even stays as it is"


def test_the_writer_of_checkpoints_is_no_stager_and_renames_the_metadata_last(tmp_path, monkeypatch):
    """`async_save` would take a stager for its own; the hashes of a checkpoint are collected at that rename."""
    assert issubclass(FileSystemWriter, compat.CheckpointWriter)
    renamed, rename = [], compat.CheckpointFileSystem.rename

    def look(self, path, new_path):
        renamed.append((Path(new_path).name, sorted(file.name for file in tmp_path.iterdir())))
        rename(self, path, new_path)

    monkeypatch.setattr(compat.CheckpointFileSystem, "rename", look)
    writer = compat.CheckpointWriter(tmp_path)
    assert isinstance(FileSystemWriter(tmp_path), AsyncStager) and not isinstance(writer, AsyncStager)
    assert type(writer.fs) is compat.CheckpointFileSystem and writer.sync_files
    dcp.save({"a": torch.ones(3)}, storage_writer=writer, no_dist=True)
    assert renamed == [(".metadata", [".metadata.tmp", "__0_0.distcp"])]


def test_torchtitan_sleeps_once_after_training():
    """When this fails, a stage ends two seconds later, or the trainer reads a clock that it does not get."""
    assert re.findall(r"\btime\.\w+", inspect.getsource(torchtitan.trainer)) == [
        *2 * ["time.perf_counter"],
        "time.sleep",
    ]
    with compat.end_without_sleep():
        torchtitan.trainer.time.sleep(600)
        assert torchtitan.trainer.time.perf_counter() <= time.perf_counter()
    assert torchtitan.trainer.time is time
