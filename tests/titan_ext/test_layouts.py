"""Every layout that gloo can run gives one process's numbers, and each reads the checkpoints of the others."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.titan_ext.launch import different_tensors, train, whole_tensors, write_data
from tests.titan_ext.test_training import DIMS, STAGE, lines
from titan_ext.config import ParallelConfig
from titan_ext.stage_run import StageRun, final_checkpoint
from titan_ext.train import build_trainer

LAYOUTS = {
    "fsdp 2": {"world_size": 2},
    "hsdp 2": {"world_size": 2, "data_parallel_replicate": 2},
    "tp 2": {"world_size": 2, "tensor_parallel": 2},
    "cp 2": {"world_size": 2, "context_parallel": 2},
    "ep 4": {"world_size": 4, "expert_parallel": 4},
    "hsdp 2 x ep 2": {"world_size": 4, "data_parallel_replicate": 2, "expert_parallel": 2},
    "fsdp 2 x tp 2, ep 4": {"world_size": 4, "tensor_parallel": 2, "expert_parallel": 4},
    "fsdp 2 x cp 2, ep 2": {"world_size": 4, "context_parallel": 2, "expert_parallel": 2},
    "cp 2 x tp 2": {"world_size": 4, "context_parallel": 2, "tensor_parallel": 2},
}
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


def stage_run(data: Path, out: Path, layout: dict, **changes) -> StageRun:
    stage = dataclasses.replace(
        STAGE, steps=STEPS, local_batch_size=1, checkpoint_interval=STEPS, heldout_interval=STEPS, **changes
    )
    parallel = ParallelConfig(precision="float32", **layout)
    return StageRun("pretrain", DIMS, stage, parallel, data, out, initial_checkpoint=None, seed=0)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "stage"
    train(stage_run(data, out, {"world_size": 1}), out.parent / "scratch")
    return out


def assert_same_numbers(one: Path, other: Path) -> None:
    metrics = [lines(out, "metrics.jsonl") for out in (one, other)]
    for key in ("step", "tokens", "loss", "grad_norm", "z_loss", "dropped"):
        values = [[line[key] for line in of_run] for of_run in metrics]
        assert values[1] == pytest.approx(values[0], rel=2e-4), key
    heldout = [[line["loss"] for line in lines(out, "heldout.jsonl")] for out in (one, other)]
    assert heldout[1] == pytest.approx(heldout[0], rel=2e-4)
    for key in ("load", "router_entropy"):
        layers = [
            [layer[key] for line in lines(out, "expert_load.jsonl")[:1] for layer in line["layers"]]
            for out in (one, other)
        ]
        torch.testing.assert_close(*(torch.tensor(values) for values in layers), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_gives_the_numbers_of_one_process(layout, data, one_process, tmp_path):
    run = stage_run(data, tmp_path / "stage", layout)
    train(run, tmp_path / "scratch")
    assert_same_numbers(one_process, run.out)


def test_drop_and_pad_drops_the_same_on_two_ranks(data, tmp_path):
    """A rank's micro-batch of two ranks is a micro-batch of one process, so the same tokens are dropped."""
    runs = [
        stage_run(data, tmp_path / str(world), {"world_size": world, "expert_parallel": world}, capacity_factor=1.0)
        for world in (1, 2)
    ]
    for run in runs:
        train(run, run.out.with_name(f"scratch{run.out.name}"))
    assert_same_numbers(*(run.out for run in runs))
    assert all(line["dropped"] > 0.01 for line in lines(runs[0].out, "metrics.jsonl"))


def save_again(run: StageRun) -> None:
    """Load the newest checkpoint of the stage under this layout and write it as the next step, untrained."""
    trainer = build_trainer(run)
    trainer.checkpointer.load(step=-1)
    trainer.step += 1
    trainer.checkpointer.save(trainer.step, last_step=True)
    trainer.close()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "chain",
    [
        [{"world_size": 2, "expert_parallel": 2}, {"world_size": 4, "expert_parallel": 4}, {"world_size": 1}],
        [{"world_size": 2}, {"world_size": 1}, {"world_size": 2, "tensor_parallel": 2}],
    ],
    ids=["ep 2 to 4 to 1", "fsdp 2 to 1 to tp 2"],
)
def test_checkpoints_load_under_other_layouts_bitwise(chain, data, tmp_path):
    run = stage_run(data, tmp_path / "stage", chain[0])
    train(run, tmp_path / "scratch")
    before = final_checkpoint(run.out, STEPS)
    names = whole_tensors(before).keys()
    assert any("exp_avg_sq" in name for name in names) and any("w1_EFD" in name for name in names)
    for number, layout in enumerate(chain[1:], 1):
        other = stage_run(data, tmp_path / f"stage{number}", layout)
        shutil.copytree(run.out / "checkpoint", other.out / "checkpoint")
        train(other, tmp_path / f"scratch{number}", save_again)
        run = other
        assert different_tensors(before, final_checkpoint(run.out, STEPS + number)) == []
