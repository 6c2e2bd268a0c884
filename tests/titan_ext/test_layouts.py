"""Every layout that gloo can run gives one process's numbers, and each reads the checkpoints of the others."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.titan_ext.stage_data import find_differences, list_entries, load_tensors, write_data
from tests.titan_ext.test_training import DIMS as TWO_LAYERS
from tests.titan_ext.test_training import STAGE, lines
from titan_ext.config import ParallelConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint
from titan_ext.training.train import build_stage_config, build_trainer

DIMS = dataclasses.replace(TWO_LAYERS, n_layers=4)
PIPELINE = {"world_size": 2, "pipeline_parallel": 2}
INTERLEAVED = PIPELINE | {"pipeline_schedule": "Interleaved1F1B"}
LAYOUTS = {
    "fsdp 2": {"world_size": 2},
    "hsdp 2": {"world_size": 2, "data_parallel_replicate": 2},
    "tp 2": {"world_size": 2, "tensor_parallel": 2},
    "cp 2": {"world_size": 2, "context_parallel": 2},
    "ep 4": {"world_size": 4, "expert_parallel": 4},
    "hsdp 2 x ep 2": {"world_size": 4, "data_parallel_replicate": 2, "expert_parallel": 2},
    "fsdp 2 x tp 2, ep 4": {"world_size": 4, "tensor_parallel": 2, "expert_parallel": 4},
    "fsdp 2 x cp 2, ep 2": {"world_size": 4, "context_parallel": 2, "expert_parallel": 2},
    "pp 4": {"world_size": 4, "pipeline_parallel": 4},
    "pp 2 x fsdp 2, ep 2": PIPELINE | {"world_size": 4, "expert_parallel": 2},
    "pp 2 x hsdp 2": PIPELINE | {"world_size": 4, "data_parallel_replicate": 2},
    "pp 2 x tp 2": PIPELINE | {"world_size": 4, "tensor_parallel": 2},
    "pp 2 interleaved x cp 2": INTERLEAVED | {"world_size": 4, "context_parallel": 2},
    "cp 2 x tp 2": {"world_size": 4, "context_parallel": 2, "tensor_parallel": 2},
}
STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


def stage_spec(data: Path, out: Path, layout: dict, **changes) -> StageSpec:
    stage = dataclasses.replace(
        STAGE, steps=STEPS, local_batch_size=1, checkpoint_interval=STEPS // 2, heldout_interval=STEPS // 2,
        router_z_loss=1.0,  # so much that its gradient, were it missing, would be seen
    )  # fmt: skip
    stage = dataclasses.replace(stage, **changes)
    parallel = ParallelConfig(precision="float32", **layout)
    return StageSpec("pretrain", DIMS, stage, parallel, data, out, initial_checkpoint=None, seed=0)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "stage"
    run_ranks(stage_spec(data, out, {"world_size": 1}), out.parent / "scratch")
    return out


def assert_same_numbers(one: Path, other: Path) -> None:
    metrics = [lines(out, "metrics.jsonl") for out in (one, other)]
    for key in ("step", "tokens", "loss", "grad_norm", "router_z", "dropped"):
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


@pytest.fixture(scope="module")
def pipeline(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "stage"
    run_ranks(stage_spec(data, out, PIPELINE), out.parent / "scratch")
    return out


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_gives_the_numbers_of_one_process(layout, data, one_process, tmp_path):
    spec = stage_spec(data, tmp_path / "stage", layout)
    run_ranks(spec, tmp_path / "scratch")
    assert_same_numbers(one_process, spec.out)


def test_drop_and_pad_drops_the_same_on_two_ranks(data, tmp_path):
    """A rank's micro-batch of two ranks is a micro-batch of one process, so the same tokens are dropped."""
    layouts = [{"world_size": 1}] + [
        {"world_size": 2, degree: 2} for degree in ("expert_parallel", "pipeline_parallel")
    ]
    specs = [stage_spec(data, tmp_path / str(i), layout, capacity_factor=1.0) for i, layout in enumerate(layouts)]
    for spec in specs:
        run_ranks(spec, spec.out.with_name(f"scratch{spec.out.name}"))
        assert_same_numbers(specs[0].out, spec.out)
    assert all(line["dropped"] > 0.01 for line in lines(specs[0].out, "metrics.jsonl"))


def test_qat_in_a_pipeline_gives_the_numbers_of_one_process(data, tmp_path):
    """Embedding and output projection round their copies of one matrix; a tolerance as in test_distillation.py."""
    layouts = [{"world_size": 1}, INTERLEAVED]
    specs = [
        stage_spec(data, tmp_path / str(i), layout, shards="sft", quantize=True) for i, layout in enumerate(layouts)
    ]
    for spec in specs:
        run_ranks(spec, spec.out.with_name(f"scratch{spec.out.name}"))
    one, two = (lines(spec.out, "metrics.jsonl") for spec in specs)
    for key, tolerance in (("loss", 2e-3), ("grad_norm", 1e-2)):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=tolerance), key


def test_a_pipeline_gives_the_numbers_of_one_process_and_goes_on_bitwise(pipeline, one_process, data, tmp_path):
    assert_same_numbers(one_process, pipeline)
    spec = stage_spec(data, tmp_path / "stage", PIPELINE)
    shutil.copytree(pipeline / f"checkpoint/step-{STEPS // 2}", spec.out / f"checkpoint/step-{STEPS // 2}")
    run_ranks(spec, tmp_path / "scratch")
    keys = ("step", "tokens", "loss", "grad_norm", "router_z")
    resumed, whole = lines(spec.out, "metrics.jsonl"), lines(pipeline, "metrics.jsonl")
    assert [[line[k] for k in keys] for line in resumed] == [[line[k] for k in keys] for line in whole[STEPS // 2 :]]
    assert find_differences(*(find_final_checkpoint(out, STEPS) for out in (spec.out, pipeline))) == []


def test_a_schedule_with_both_ends_on_one_rank_is_refused(data, tmp_path):
    config = build_stage_config(stage_spec(data, tmp_path / "stage", PIPELINE))
    parallelism = dataclasses.replace(config.parallelism, pipeline_parallel_schedule="ZBVZeroBubble")
    with pytest.raises(ValueError, match="choose one of 1F1B, Interleaved1F1B"):
        dataclasses.replace(config, parallelism=parallelism)


def test_a_pipeline_without_a_split_is_refused(data, tmp_path):
    config = build_stage_config(stage_spec(data, tmp_path / "stage", PIPELINE))
    parallelism = dataclasses.replace(config.parallelism, module_fqns_per_model_part=None)
    with pytest.raises(ValueError, match="module_fqns_per_model_part is not set: torchtitan's own split may leave"):
        dataclasses.replace(config, parallelism=parallelism)


def test_a_pipeline_starts_with_the_weights_of_one_process(data, tmp_path):
    layouts = [{"world_size": 1}, INTERLEAVED | {"world_size": 4}]
    specs = [stage_spec(data, tmp_path / str(i), layout) for i, layout in enumerate(layouts)]
    for spec in specs:
        run_ranks(spec, spec.out.with_name(f"scratch{spec.out.name}"), save_again)
    assert find_differences(*(find_final_checkpoint(spec.out, 1) for spec in specs)) == []


def save_again(spec: StageSpec) -> None:
    """Load the newest checkpoint of the stage under this layout and write it as the next step, untrained."""
    trainer = build_trainer(spec)
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
    spec = stage_spec(data, tmp_path / "stage", chain[0])
    run_ranks(spec, tmp_path / "scratch")
    assert_layouts_read(chain[1:], spec, tmp_path)


def test_checkpoints_go_from_a_pipeline_and_back_bitwise(pipeline, data, tmp_path):
    chain = [{"world_size": 1}, INTERLEAVED | {"world_size": 4}]
    assert_layouts_read(chain, stage_spec(data, pipeline, PIPELINE), tmp_path)


def assert_layouts_read(chain: list[dict], spec: StageSpec, folder: Path) -> None:
    """Each layout loads what the one before wrote, and writes the same again: the same keys with the same bits."""
    before = find_final_checkpoint(spec.out, STEPS)
    names = load_tensors(before).keys()
    assert any("exp_avg_sq" in name for name in names) and any("w1_EFD" in name for name in names)
    for number, layout in enumerate(chain, 1):
        other = stage_spec(spec.data, folder / f"stage{number}", layout)
        shutil.copytree(spec.out / "checkpoint", other.out / "checkpoint")
        run_ranks(other, folder / f"scratch{number}", save_again)
        spec = other
        after = find_final_checkpoint(spec.out, STEPS + number)
        assert find_differences(before, after) == [] and list_entries(before) == list_entries(after)
