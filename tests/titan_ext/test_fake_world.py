"""The published layouts at S width on fake worlds of the right size: a rank builds its part and goes both ways.

Collectives of the fake backend exchange nothing, so numbers mean nothing here; shapes, placements and the kinds of
every tensor do. `spmd_types` is the backend of GPUs, with torchtitan's type checker on.
"""

import dataclasses
import json
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining._utils import _StageMeta, extract_tensor_metas
from torch.distributed.pipelining.stage import PipelineStage
from torchtitan.config.configs import CommConfig
from torchtitan.trainer import Trainer

from tests.titan_ext.stage_data import write_data
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.schedules import published_stages
from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import build_stage_config
from titan_ext.training.trainer import StageTrainer

DIMS = dataclasses.replace(FLAVORS["S"], n_layers=2, vocab_size=1024)
NARROW = dataclasses.replace(FLAVORS["tiny"], n_layers=4, n_experts=60)
SEQ_LEN = 64
LAYOUTS = {
    "64 ranks, ep 4": {"world_size": 64, "expert_parallel": 4},
    "256 ranks in 4 replicas, ep 4": {"world_size": 256, "data_parallel_replicate": 4, "expert_parallel": 4},
    "32 ranks, tp 4, ep 4": {"world_size": 32, "tensor_parallel": 4, "expert_parallel": 4},
    "8 ranks, tp 2": {"world_size": 8, "tensor_parallel": 2},
    "32 ranks, cp 4, ep 4": {"world_size": 32, "context_parallel": 4, "expert_parallel": 4},
}
PIPELINES = {
    "64 ranks, pp 4, ep 4": {"world_size": 64, "pipeline_parallel": 4, "expert_parallel": 4},
    "32 ranks in 2 replicas, pp 2 interleaved": {
        "world_size": 32, "pipeline_parallel": 2, "pipeline_schedule": "Interleaved1F1B", "data_parallel_replicate": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    domains = ("web", "math", "code", "knowledge", "science")
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size, domains=domains)


STAGE = dataclasses.replace(
    published_stages()["pretrain"], seq_len=SEQ_LEN, local_batch_size=1, steps=1, warmup_steps=0
)


def build_trainer(spec: StageSpec) -> StageTrainer:
    os.environ["NGPU"] = os.environ["WORLD_SIZE"]  # where torchtitan looks for the size of a fake world
    config = build_stage_config(spec)
    config.comm = CommConfig(mode="fake_backend")
    config.parallelism.spmd_backend = spec.name
    config.compile.backend = "aot_eager"
    parallel = spec.parallel
    config.debug.spmd_typechecking = (
        spec.name == "spmd_types" and parallel.pipeline_parallel == 1 and not parallel.compile
    )
    config.checkpoint.enable = config.validator.enable = False
    return config.build()


def go_both_ways(spec: StageSpec) -> None:
    trainer = build_trainer(spec)
    experts = trainer.model_parts[0].layers["0"].moe.routed_experts.inner_experts

    def note_experts(module: torch.nn.Module, inputs: tuple) -> None:
        (spec.out / "experts").write_text(str(len(inputs[1])))

    if not spec.parallel.compile:  # no file can be written out of a graph
        experts.register_forward_pre_hook(note_experts)
    inputs, labels = next(iter(trainer.dataloader))
    loss = Trainer.forward_backward_step(
        trainer, input_dict=inputs, labels=labels, global_valid_tokens=torch.tensor(labels.numel())
    )
    assert loss.shape == ()
    assert_gradients(trainer)
    trainer.close()
    dist.destroy_process_group()


def assert_gradients(trainer: StageTrainer) -> None:
    for part in trainer.model_parts:
        for name, parameter in part.named_parameters():
            if name != "lm_head.weight":  # tied: its gradient is the embedding's
                assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


def tell_shapes(stage: PipelineStage) -> None:
    """The tensors that enter and leave a stage, which its neighbours tell it where there are any."""
    tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    hidden = torch.zeros(1, SEQ_LEN, NARROW.d_model, dtype=torch.bfloat16, requires_grad=True)
    stage._user_meta = _StageMeta(
        inputs=extract_tensor_metas((tokens if stage.is_first else hidden,)), outputs=extract_tensor_metas((hidden,))
    )


def go_both_ways_in_a_pipeline(spec: StageSpec) -> None:
    trainer = build_trainer(spec)
    schedule = trainer.pp_schedule
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        tell_shapes(stage)
    micro_batches = list(islice(iter(trainer.dataloader), trainer.num_pipeline_parallel_microbatches))
    Trainer.forward_backward_step(
        trainer,
        input_dict=[dict(inputs) for inputs, _ in micro_batches],
        labels=[labels for _, labels in micro_batches],
        global_valid_tokens=torch.tensor(spec.stage.global_batch_size * SEQ_LEN),
    )
    trainer.tied_embedding.reduce_tied_grad()
    assert_gradients(trainer)
    trainer.optimizers.step()
    trainer.tied_embedding.sync_tied_weight()
    layers = [int(i) for part in trainer.model_parts for i in part.layers]
    (spec.out.parent / f"layers_{os.environ['RANK']}").write_text(json.dumps(layers))
    trainer.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_published_stages_build_and_step(layout, backend, data, tmp_path):
    if backend == "spmd_types" and layout.get("context_parallel"):
        pytest.skip("this backend does context parallelism with flex attention only, which has no backward on the CPU")
    stage = dataclasses.replace(STAGE, global_batch_size=2048)
    parallel = ParallelConfig(precision="bfloat16", **layout)
    spec = StageSpec(backend, DIMS, stage, parallel, data, tmp_path / "stage", initial_checkpoint=None, seed=0)
    run_ranks(spec, tmp_path / "scratch", go_both_ways, ranks=[0])
    assert int((spec.out / "experts").read_text()) == DIMS.n_experts // parallel.expert_parallel


def test_published_stages_compile(data, tmp_path):
    """A block is one graph under `spmd_types`, recomputed selectively, as on a GPU; the type checker is off."""
    stage = dataclasses.replace(STAGE, global_batch_size=2048)
    parallel = ParallelConfig(world_size=64, expert_parallel=4, compile=True, activation_checkpoint="selective")
    spec = StageSpec("spmd_types", DIMS, stage, parallel, data, tmp_path / "stage", initial_checkpoint=None, seed=0)
    run_ranks(spec, tmp_path / "scratch", go_both_ways, ranks=[0])


@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("layout", PIPELINES.values(), ids=PIPELINES.keys())
def test_first_and_last_stage_of_a_pipeline_build_and_step(layout, backend, data, tmp_path):
    parallel = ParallelConfig(precision="bfloat16", **layout)
    stage = dataclasses.replace(STAGE, global_batch_size=4 * parallel.data_parallel)
    spec = StageSpec(backend, NARROW, stage, parallel, data, tmp_path / "stage", initial_checkpoint=None, seed=0)
    ranks = [0, parallel.world_size - 1]
    run_ranks(spec, tmp_path / "scratch", go_both_ways_in_a_pipeline, ranks=ranks)
    first, last = (json.loads((tmp_path / f"layers_{rank}").read_text()) for rank in ranks)
    assert 0 in first and NARROW.n_layers - 1 in last and not set(first) & set(last)
