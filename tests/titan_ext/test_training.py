"""Real training over real processes: layouts agree, a killed run goes on where it was, QAT starts from its parent."""

import dataclasses
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.export.dcp_checkpoint import CheckpointTensors
from tests.titan_ext.stage_data import find_differences, load_tensors, write_data
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.training.launch import run_ranks, start_ranks
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint
from titan_ext.training.train import build_stage_config

DIMS = ModelDims(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, expert_hidden=32, shared_hidden=64, n_experts=8,
    top_k=4, vocab_size=96, max_seq_len=64,
)  # fmt: skip
STAGE = StageConfig(
    steps=20, seq_len=64, global_batch_size=4, local_batch_size=2, learning_rate=3e-3, shards="pretrain",
    mixture={"web": 0.6, "code": 0.4}, checkpoint_interval=8, heldout_interval=8, heldout_batches=2, log_interval=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


def stage_spec(data: Path, out: Path, world_size: int, **changes) -> StageSpec:
    parallel = ParallelConfig(world_size=world_size, expert_parallel=world_size, precision="float32")
    spec = StageSpec("pretrain", DIMS, STAGE, parallel, data, out, initial_checkpoint=None, seed=0)
    return dataclasses.replace(spec, **changes)


def lines(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture
def plain_folder():
    """A folder for torch's writer of Hugging Face shards: it looks for its own files by a pattern made of their path.

    Below the folder of other tests it finds none and writes files that no reader takes. The product writes its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one") / "stage"
    run_ranks(stage_spec(data, out, world_size=1), out.parent / "scratch")
    return out


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two") / "stage"
    run_ranks(stage_spec(data, out, world_size=2), out.parent / "scratch")
    return out


def test_expert_parallel_losses_equal_one_process(one_process, two_processes):
    one, two = lines(one_process, "metrics.jsonl"), lines(two_processes, "metrics.jsonl")
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 21))
    for key in ("loss", "grad_norm", "router_z"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=2e-4), key
    hashes = [[line["data_hash"] for line in lines] for lines in (one, two)]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 20, "both layouts train on the same samples"
    assert one[-1]["loss"] < one[0]["loss"] - 1.0, "twenty steps on counting sequences must lower the loss"
    heldout = [[line["loss"] for line in lines(out, "heldout.jsonl")] for out in (one_process, two_processes)]
    assert heldout[1] == pytest.approx(heldout[0], rel=2e-4)


def test_expert_load_is_complete_on_every_layout(one_process, two_processes):
    for out in (one_process, two_processes):
        records = lines(out, "expert_load.jsonl")
        assert [line["step"] for line in records if "load" in line["layers"][0]] == [1, 20], (
            "most bytes are seldom written"
        )
        for line in records:
            assert len(line["layers"]) == DIMS.n_layers
            for layer in (layer for layer in line["layers"] if "load" in layer):
                assert sum(layer["load"]) == pytest.approx(1.0, abs=1e-4)
                assert layer["max_over_mean"] == pytest.approx(max(layer["load"]) * DIMS.n_experts, rel=1e-3)
                assert layer["dead"] == sum(share == 0 for share in layer["load"])


def test_tensorboard_has_the_router_of_every_layer(one_process):
    (events,) = one_process.rglob("events.out.*")
    board = EventAccumulator(str(events)).Reload()
    of_layer = ("max_over_mean", "entropy", "dead", "dropped", "router_entropy")
    expected = {f"moe/layer_{i}/{name}" for i in range(DIMS.n_layers) for name in of_layer}
    assert expected | {"moe/router_z", "moe/dropped", "skipped_steps"} <= set(board.Tags()["scalars"])
    written = [event.value for event in board.Scalars("moe/router_z")]
    assert written == pytest.approx([line["router_z"] for line in lines(one_process, "metrics.jsonl")])


@pytest.mark.parametrize("recomputed", ["selective", "full"])
def test_recomputed_activations_change_no_number(recomputed, data, one_process, tmp_path):
    parallel = ParallelConfig(world_size=1, precision="float32", activation_checkpoint=recomputed)
    spec = stage_spec(data, tmp_path / "stage", world_size=1, parallel=parallel)
    run_ranks(spec, tmp_path / "scratch")
    keys = ("loss", "grad_norm", "router_z", "dropped")
    assert [[line[key] for key in keys] for line in lines(spec.out, "metrics.jsonl")] == [
        pytest.approx([line[key] for key in keys], rel=1e-5) for line in lines(one_process, "metrics.jsonl")
    ]
    loads = [lines(out, "expert_load.jsonl") for out in (spec.out, one_process)]
    assert [layer["load"] for layer in loads[0][-1]["layers"]] == [layer["load"] for layer in loads[1][-1]["layers"]]


def save_as_hugging_face(spec: StageSpec) -> None:
    config = build_stage_config(spec)
    config.checkpoint.last_save_in_hf = config.checkpoint.last_save_model_only = True
    trainer = config.build()
    trainer.checkpointer.load(step=-1)
    trainer.checkpointer.save(STAGE.steps + 1, last_step=True)
    trainer.close()
    dist.destroy_process_group()


def test_torchtitans_hugging_face_checkpoint_is_the_exporters(data, two_processes, plain_folder, tmp_path):
    spec = stage_spec(data, plain_folder / "stage", world_size=2)
    before = find_final_checkpoint(two_processes, STAGE.steps)
    shutil.copytree(before, spec.out / "checkpoint" / before.name)
    run_ranks(spec, tmp_path / "scratch", save_as_hugging_face)
    files = (spec.out / f"checkpoint/step-{STAGE.steps + 1}").glob("*.safetensors")
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = CheckpointTensors(before, DIMS)
    assert written.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(written[name], tensor)] == []


def test_padding_and_repeats_are_reported(one_process):
    told = lines(one_process, "data.jsonl")
    assert [line["step"] for line in told] == list(range(1, 21))
    for line in told:
        assert line["padding"] == 0  # texts are cut, not padded
        assert sum(line["tokens"].values()) == line["step"] * STAGE.global_batch_size * STAGE.seq_len
    assert all(told[-1]["epochs"][domain] > told[0]["epochs"][domain] > 0 for domain in STAGE.mixture)


def kill_at_step(step: int, spec: StageSpec, scratch: Path) -> None:
    processes = start_ranks(spec, scratch)
    metrics = spec.out / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert time.monotonic() < deadline, (scratch / "rank_0.log").read_text()[-2000:]
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()


def test_killed_run_goes_on_bitwise(data, two_processes, tmp_path):
    """It is killed twice: torchtitan #571 and #3907 began the third start at the step, or the data, of the second."""
    spec = stage_spec(data, tmp_path / "stage", world_size=2)
    for step in (11, 17):
        kill_at_step(step, spec, tmp_path / "scratch")
    run_ranks(spec, tmp_path / "scratch")
    log = (spec.out / "logs/rank_0.log").read_text()
    assert re.search(r"step-8\b(.|\n)*step-16\b", log), "every start loads the newest checkpoint"
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "router_z")
    resumed, whole = lines(spec.out, "metrics.jsonl"), lines(two_processes, "metrics.jsonl")
    assert [[line[k] for k in keys] for line in resumed] == [[line[k] for k in keys] for line in whole]
    ends = [find_final_checkpoint(out, STAGE.steps) for out in (spec.out, two_processes)]
    assert find_differences(*ends) == []


@pytest.mark.parametrize("step", [16, 20])
def test_a_loss_that_was_not_measured_before_a_kill_is_measured(step, data, two_processes, tmp_path):
    """A step's checkpoint is saved first, the held-out loss after it is measured then."""
    expected = lines(two_processes, "heldout.jsonl")
    assert step in {line["step"] for line in expected}
    out = shutil.copytree(two_processes, tmp_path / "stage")
    if step < STAGE.steps:
        shutil.rmtree(out / f"checkpoint/step-{STAGE.steps}")
    kept = [json.dumps(line) + "\n" for line in expected if line["step"] < step]
    (out / "heldout.jsonl").write_text("".join(kept))
    run_ranks(stage_spec(data, out, world_size=2), tmp_path / "scratch")
    assert lines(out, "heldout.jsonl") == expected
    assert [line["step"] for line in lines(out, "metrics.jsonl")] == list(range(1, STAGE.steps + 1))


def test_two_runs_from_one_seed_are_equal_bitwise(data, tmp_path):
    """Training runs in bfloat16 with drop-and-pad, as in the text stages; another seed gives other weights."""
    stage = dataclasses.replace(STAGE, steps=5, checkpoint_interval=5, heldout_interval=5, capacity_factor=1.5)
    parallel = ParallelConfig(world_size=2, expert_parallel=2, precision="bfloat16", deterministic=True)
    ends = []
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        spec = stage_spec(data, tmp_path / name, world_size=2, stage=stage, parallel=parallel, seed=seed)
        run_ranks(spec, tmp_path / f"scratch_{name}")
        ends.append(find_final_checkpoint(spec.out, 5))
    assert find_differences(*ends[:2]) == []
    assert find_differences(ends[0], ends[2]) != []


def test_qat_stage_starts_from_the_parent_on_another_layout(data, two_processes, tmp_path):
    parent = find_final_checkpoint(two_processes, STAGE.steps)
    stage = dataclasses.replace(STAGE, steps=2, shards="sft", learning_rate=1e-9, weight_decay=0.0, quantize=True)
    spec = stage_spec(data, tmp_path / "stage", world_size=1, stage=stage, initial_checkpoint=parent, name="qat")
    run_ranks(spec, tmp_path / "scratch")
    name = "layers.1.moe.routed_experts.inner_experts.w1_EFD"
    weights = []
    for checkpoint in (parent, find_final_checkpoint(spec.out, 2)):
        state = {name: torch.empty(DIMS.n_experts, DIMS.expert_hidden, DIMS.d_model)}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
        weights.append(state[name])
    torch.testing.assert_close(*weights, rtol=0, atol=1e-7)
    assert lines(spec.out, "metrics.jsonl")[0]["loss"] < 6


def test_a_stage_killed_before_its_first_checkpoint_starts_from_its_parent_again(data, one_process, tmp_path):
    """torchtitan #3732: with a folder but no checkpoint in it, a stage began with random weights without a word."""
    parent = find_final_checkpoint(one_process, STAGE.steps)
    stage = dataclasses.replace(STAGE, steps=1, learning_rate=1e-9)
    spec = stage_spec(data, tmp_path / "stage", world_size=1, stage=stage, initial_checkpoint=parent)
    half = spec.out / "checkpoint" / "step-1"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"cut off")
    run_ranks(spec, tmp_path / "scratch")
    first, trained = lines(spec.out, "metrics.jsonl")[0]["loss"], lines(one_process, "metrics.jsonl")
    assert abs(first - trained[-1]["loss"]) < 0.5 < trained[0]["loss"] - 0.5 - first


def test_the_expert_bias_of_a_checkpoint_is_the_trained_one(two_processes):
    """torchtitan #1222: checkpoints held the zeros that the bias began with."""
    tensors = load_tensors(find_final_checkpoint(two_processes, STAGE.steps))
    biases = [tensor for name, tensor in tensors.items() if "expert_bias" in name]
    assert len(biases) == DIMS.n_layers
    assert all(bias.abs().max() > 0 and bias.dtype == torch.float32 for bias in biases)


def test_held_out_loss_of_conversations_is_the_mean_over_all_targets(data, one_process, tmp_path):
    """torchtitan #4167 took the mean of the batches' means, and #1759 divided by the steps of the accumulation."""
    losses = []
    for batch in (1, 4):  # four micro-batches a step, of which some have few targets; and one
        stage = dataclasses.replace(STAGE, steps=1, shards="sft", local_batch_size=batch, heldout_interval=1)
        spec = stage_spec(
            data, tmp_path / f"stage-{batch}", world_size=1, stage=stage, name="sft",
            initial_checkpoint=find_final_checkpoint(one_process, STAGE.steps),
        )  # fmt: skip
        run_ranks(spec, tmp_path / "scratch")
        losses.append(lines(spec.out, "heldout.jsonl")[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_unfinished_stage_has_no_final_checkpoint(two_processes):
    with pytest.raises(ValueError, match="step-21: no finished checkpoint"):
        find_final_checkpoint(two_processes, 21)


def test_numbers_that_are_not_finite_stop_the_stage_before_the_update(data, tmp_path):
    stage = dataclasses.replace(STAGE, learning_rate=1e30, checkpoint_interval=1)
    spec = stage_spec(data, tmp_path / "stage", world_size=1, stage=stage)
    with pytest.raises(RuntimeError, match="not finite, so the parameters were not updated"):
        run_ranks(spec, tmp_path / "scratch")
    steps = [line["step"] for line in lines(spec.out, "metrics.jsonl")]
    checkpoints = sorted(int(path.name.removeprefix("step-")) for path in (spec.out / "checkpoint").glob("step-*"))
    assert 1 <= max(checkpoints) == max(steps) < STAGE.steps, "neither logged nor saved after the last good step"


def test_skipped_steps_are_logged_and_leave_the_weights_alone(data, tmp_path):
    """With a threshold below every deviation, each step above the mean is a spike; both ranks of a pipeline say so."""
    stage = dataclasses.replace(STAGE, steps=44, checkpoint_interval=100, learning_rate=1e-4, skip_spikes_sigma=1e-3)
    parallel = ParallelConfig(world_size=2, pipeline_parallel=2, precision="float32")
    spec = stage_spec(data, tmp_path / "stage", world_size=2, stage=stage, parallel=parallel)
    run_ranks(spec, tmp_path / "scratch")
    skipped = [line["skipped_steps"] for line in lines(spec.out, "metrics.jsonl")]
    assert skipped[:32] == [0] * 32 and 0 < skipped[-1] <= 12
    choices = STAGE.global_batch_size * STAGE.seq_len * DIMS.top_k
    for layer in (layer for line in lines(spec.out, "expert_load.jsonl") for layer in line["layers"]):
        if "load" not in layer:
            continue
        counts = [share * choices for share in layer["load"]]
        assert sum(counts) == pytest.approx(choices, abs=0.1), "a skipped step's choices are counted as well"
        assert counts == pytest.approx([round(count) for count in counts], abs=2e-3), "and no other step's with them"
    logs = [(spec.out / f"logs/rank_{rank}.log").read_text() for rank in range(2)]
    assert [log.count(" is skipped: ") for log in logs] == [skipped[-1]] * 2
    state = {f"optimizer.state.{name}.weight.step": torch.zeros(()) for name in ("tok_embeddings", "norm")}
    weights = {f"{name}.weight": torch.empty(DIMS.vocab_size, DIMS.d_model) for name in ("tok_embeddings", "lm_head")}
    dcp.load(checkpoint := state | weights, checkpoint_id=find_final_checkpoint(spec.out, 44), no_dist=True)
    assert [checkpoint[name] for name in state] == [44 - skipped[-1]] * 2
    assert torch.equal(*(checkpoint[name] for name in weights))
