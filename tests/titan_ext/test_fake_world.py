"""The published layouts at S width on fake worlds of the right size: rank 0 builds its part and goes both ways.

Collectives of the fake backend exchange nothing, so numbers mean nothing here; shapes, placements and the kinds of
every tensor do. `spmd_types` is the backend of GPUs, with torchtitan's type checker on.
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchtitan.config.configs import CommConfig
from torchtitan.trainer import Trainer

from tests.titan_ext.launch import train, write_data
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.stage_run import StageRun
from titan_ext.stages import published_stages
from titan_ext.train import stage_config

DIMS = dataclasses.replace(FLAVORS["S"], n_layers=2, vocab_size=1024)
LAYOUTS = {
    "64 ranks, ep 4": {"world_size": 64, "expert_parallel": 4},
    "256 ranks in 4 replicas, ep 4": {"world_size": 256, "data_parallel_replicate": 4, "expert_parallel": 4},
    "32 ranks, tp 4, ep 4": {"world_size": 32, "tensor_parallel": 4, "expert_parallel": 4},
    "8 ranks, tp 2": {"world_size": 8, "tensor_parallel": 2},
    "32 ranks, cp 4, ep 4": {"world_size": 32, "context_parallel": 4, "expert_parallel": 4},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    domains = ("web", "math", "code", "knowledge", "science")
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size, domains=domains)


def go_both_ways(run: StageRun) -> None:
    os.environ["NGPU"] = os.environ["WORLD_SIZE"]  # where torchtitan looks for the size of a fake world
    config = stage_config(run)
    config.comm = CommConfig(mode="fake_backend")
    config.parallelism.spmd_backend = run.name
    config.debug.spmd_typechecking = run.name == "spmd_types"
    config.checkpoint.enable = config.validator.enable = False
    trainer = config.build()
    experts = trainer.model_parts[0].layers["0"].moe.routed_experts.inner_experts

    def note_experts(module: torch.nn.Module, inputs: tuple) -> None:
        (run.out / "experts").write_text(str(len(inputs[1])))

    experts.register_forward_pre_hook(note_experts)
    inputs, labels = next(iter(trainer.dataloader))
    loss = Trainer.forward_backward_step(
        trainer, input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(labels.numel())
    )
    assert loss.shape == ()
    for name, parameter in trainer.model_parts[0].named_parameters():
        if name != "lm_head.weight":  # tied: its gradient is the embedding's
            assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
    trainer.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_published_stages_build_and_step(layout, backend, data, tmp_path):
    if backend == "spmd_types" and layout.get("context_parallel"):
        pytest.skip("this backend does context parallelism with flex attention only, which has no backward on the CPU")
    stage = dataclasses.replace(published_stages()["pretrain"], seq_len=64, local_batch_size=1, steps=1, warmup_steps=0)
    parallel = ParallelConfig(precision="bfloat16", **layout)
    run = StageRun(backend, DIMS, stage, parallel, data, tmp_path / "stage", initial_checkpoint=None, seed=0)
    train(run, tmp_path / "scratch", go_both_ways, ranks=1)
    assert int((run.out / "experts").read_text()) == DIMS.n_experts // parallel.expert_parallel
