"""Checkpoints of real stages: beside the training, by time, for good, before a stop; and other options after one."""

import dataclasses
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner

from core.checksums import CHECKSUMS, verify_checksums
from core.errors import RefusedInput
from tests.titan_ext.stage_data import find_differences, write_data
from tests.titan_ext.test_training import DIMS, STAGE, lines, stage_spec
from titan_ext.config import StageConfig
from titan_ext.training.checkpoint_files import HashedWriter, find_damage
from titan_ext.training.checkpoints import PERMANENT
from titan_ext.training.launch import run_ranks, start_ranks
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint, list_finished_checkpoints
from titan_ext.training.train import build_trainer, run_stage

TOKENS_PER_STEP = STAGE.global_batch_size * STAGE.seq_len


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A stage of one process that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "stage"
    run_ranks(stage_spec(data, out, world_size=1), out.parent / "scratch")
    return out


def wait_for_step(step: int, spec: StageSpec, scratch: Path) -> None:
    deadline = time.monotonic() + 200
    while not ((spec.out / "metrics.jsonl").exists() and len(lines(spec.out, "metrics.jsonl")) >= step):
        assert time.monotonic() < deadline, (scratch / "rank_0.log").read_text()[-2000:]
        time.sleep(0.02)


def train_while_a_save_hangs(spec: StageSpec) -> None:
    """Run a stage whose checkpoint of step 16 never gets its metadata."""
    finish = HashedWriter.finish

    def hang(self, metadata, results):
        if "step-16" in str(self.path):
            time.sleep(600)
        finish(self, metadata, results)

    HashedWriter.finish = hang
    run_stage(spec)


def test_a_stage_killed_while_it_saves_goes_on_from_the_checkpoint_before(data, whole, tmp_path):
    """Training goes on while step 16 is being written, all files of which are there but the last."""
    spec = stage_spec(data, tmp_path / "stage", world_size=1)
    processes = start_ranks(spec, tmp_path / "scratch", train_while_a_save_hangs)
    wait_for_step(19, spec, tmp_path / "scratch")
    for process in processes:
        process.kill()
        process.join()
    assert any((spec.out / "checkpoint/step-16").glob("*.distcp"))
    assert list_finished_checkpoints(spec.out) == [8]
    run_ranks(spec, tmp_path / "scratch")
    log = (spec.out / "logs/rank_0.log").read_text()
    assert "step-16 was not finished, and is removed" in log and "Training starts at step 9" in log
    assert list_finished_checkpoints(spec.out) == [8, 16, 20]
    assert find_differences(*(find_final_checkpoint(out, STAGE.steps) for out in (spec.out, whole))) == []


@pytest.mark.parametrize("way", ["signal", "file"])
def test_a_stage_that_is_asked_to_stop_saves_the_next_step_and_resumes_there(way, data, tmp_path):
    """One of two ranks gets the signal; both stop after the same step."""
    stage = dataclasses.replace(STAGE, steps=400, checkpoint_interval=0, heldout_interval=1000)
    spec = stage_spec(data, tmp_path / "stage", world_size=2, stage=stage, stop_file=tmp_path / "stop")
    processes = start_ranks(spec, tmp_path / "scratch")
    wait_for_step(5, spec, tmp_path / "scratch")
    if way == "signal":
        os.kill(processes[1].pid, signal.SIGTERM)
    else:
        spec.stop_file.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    (stopped,) = list_finished_checkpoints(spec.out)
    assert 5 <= stopped < 400
    assert len(lines(spec.out, "metrics.jsonl")) == stopped
    spec.stop_file.unlink(missing_ok=True)
    shorter = dataclasses.replace(spec, stage=dataclasses.replace(stage, steps=stopped + 1))
    run_ranks(shorter, tmp_path / "scratch")
    assert [line["step"] for line in lines(spec.out, "metrics.jsonl")] == list(range(1, stopped + 2))


def test_checkpoints_by_time_of_which_some_are_for_good(data, tmp_path):
    """A thousandth of a second has passed at every step. Rank 0's clock decides: the other's stands still.

    The ranks vote in the step before the save, so a step that is saved votes for none.
    """
    stage = dataclasses.replace(
        STAGE, steps=8, checkpoint_interval=0, checkpoint_minutes=1e-5, heldout_interval=20,
        checkpoint_permanent_tokens=2.5 * TOKENS_PER_STEP,
    )  # fmt: skip
    assert stage.permanent_interval == 3
    spec = stage_spec(data, tmp_path / "stage", world_size=2, stage=stage)
    run_ranks(spec, tmp_path / "scratch", train_without_a_clock_on_rank_1)
    assert list_finished_checkpoints(spec.out) == [3, 5, 6, 8]
    assert [path.parent.name for path in sorted(spec.out.rglob(PERMANENT))] == ["step-3", "step-6"]
    assert sorted(path.name for path in (spec.out / "checkpoint").iterdir()) == ["step-3", "step-5", "step-6", "step-8"]


def train_without_a_clock_on_rank_1(spec: StageSpec) -> None:
    trainer = build_trainer(spec)
    if dist.get_rank() == 1:
        trainer.checkpointer._seconds = 0.0
    trainer.train()
    trainer.close()
    dist.destroy_process_group()


def count_plans(spec: StageSpec) -> None:
    made, plan = [], DefaultSavePlanner._create_global_plan

    def count(self, plans):
        made.append(len(plans))
        return plan(self, plans)

    DefaultSavePlanner._create_global_plan = count
    run_stage(spec)
    if os.environ["RANK"] == "0":
        (spec.out / "plans").write_text(str(made))


def test_who_writes_what_is_planned_once(data, tmp_path):
    stage = dataclasses.replace(STAGE, steps=5, checkpoint_interval=1)
    spec = stage_spec(data, tmp_path / "stage", world_size=2, stage=stage)
    run_ranks(spec, tmp_path / "scratch", count_plans)
    assert (spec.out / "plans").read_text() == "[2]", "one plan of two ranks for five checkpoints"
    assert list_finished_checkpoints(spec.out) == [3, 4, 5], "the latest two, and the one after the last step"


CHANGED = dataclasses.replace(
    STAGE, learning_rate=1e-3, weight_decay=0.3, beta2=0.9, max_grad_norm=0.05, schedule="linear", steps=24
)


def train_and_switch(spec: StageSpec) -> None:
    """Train with the options of `spec`, and from step 9 on with those of CHANGED, in one process without a load."""
    trainer = build_trainer(spec)
    other = build_trainer(dataclasses.replace(spec, stage=CHANGED, out=spec.out / "other"))
    save = trainer.checkpointer.save

    def switch(step: int, last_step: bool) -> bool:
        saved = save(step, last_step=last_step)
        if step == 8:
            (scheduler,), (target,) = trainer.lr_schedulers, other.lr_schedulers
            scheduler.base_lrs, scheduler.lr_lambdas = target.base_lrs, target.lr_lambdas
            (group,) = scheduler.optimizer.param_groups
            rate = scheduler.base_lrs[0] * scheduler.lr_lambdas[0](8)
            group.update(betas=(0.9, 0.9), weight_decay=0.3, lr=rate, initial_lr=1e-3)
            scheduler._last_lr = [rate]  # what is logged
            trainer.config.training.max_norm, trainer.config.training.steps = 0.05, 24
        return saved

    trainer.checkpointer.save = switch
    trainer.train()
    trainer.close()
    dist.destroy_process_group()


def continue_at(step: int, source: Path, spec: StageSpec, stage: StageConfig) -> StageSpec:
    """Put the checkpoint of a step into the stage's folder, as the driver leaves it, and return the continued stage."""
    shutil.copytree(source / f"checkpoint/step-{step}", spec.out / f"checkpoint/step-{step}")
    return dataclasses.replace(spec, stage=stage, continued_at=step)


def test_other_options_after_a_checkpoint_are_those_of_a_training_that_switched_there(data, tmp_path):
    reference = stage_spec(data, tmp_path / "reference", world_size=1)
    reference = dataclasses.replace(reference, stage=dataclasses.replace(STAGE, checkpoints_kept=5))
    run_ranks(reference, tmp_path / "scratch", train_and_switch)
    rates = [line["lr"] for line in lines(reference.out, "metrics.jsonl")]
    assert rates[7] > 2 * rates[8], "the reference did switch"
    spec = continue_at(8, reference.out, stage_spec(data, tmp_path / "stage", world_size=1), CHANGED)
    run_ranks(spec, tmp_path / "scratch")
    assert [line["lr"] for line in lines(spec.out, "metrics.jsonl")] == rates[8:]
    assert find_differences(*(find_final_checkpoint(out, 24) for out in (spec.out, reference.out))) == []


def test_another_mixture_goes_on_from_a_checkpoint_and_resumes(data, whole, tmp_path):
    stage = dataclasses.replace(STAGE, mixture={"web": 1.0}, steps=18)
    spec = continue_at(8, whole, stage_spec(data, tmp_path / "stage", world_size=1), stage)
    run_ranks(dataclasses.replace(spec, stage=dataclasses.replace(stage, steps=17)), tmp_path / "scratch")
    run_ranks(spec, tmp_path / "scratch")  # from the checkpoint of step 17, whose loader is of the new mixture
    before, after = lines(whole, "data.jsonl")[7], lines(spec.out, "data.jsonl")
    assert [line["step"] for line in after] == list(range(9, 19))
    for line in after:
        assert line["tokens"]["web"] - before["tokens"]["web"] == (line["step"] - 8) * TOKENS_PER_STEP
    assert after[0]["epochs"]["web"] > before["epochs"]["web"], "its documents go on"


def test_another_mixture_without_a_continuation_is_refused(data, whole, tmp_path):
    stage = dataclasses.replace(STAGE, mixture={"web": 1.0})
    spec = continue_at(8, whole, stage_spec(data, tmp_path / "stage", world_size=1), stage)
    with pytest.raises(RuntimeError, match=r"belongs to another order of data(.|\n)*--continue-from"):
        run_ranks(dataclasses.replace(spec, continued_at=None), tmp_path / "scratch")
    assert RefusedInput.__name__ in (tmp_path / "scratch/rank_0.log").read_text()


def damage(kind: str, folder: Path) -> Path:
    """Damage a file of a checkpoint and return its path."""
    path = folder / (".metadata" if kind == "metadata" else "__1_0.distcp")
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind in ("truncated", "metadata"):
        path.write_bytes(content[:-7])
    else:  # one bit
        path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "changed", "metadata"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(kind, data, tmp_path):
    """The stage ends with the parameters of one that nobody disturbed."""
    spec = stage_spec(data, tmp_path / "stage", world_size=2)
    run_ranks(spec, tmp_path / "scratch")
    shutil.copytree(spec.out, tmp_path / "undisturbed")
    assert list_finished_checkpoints(spec.out) == [8, 16, 20]
    for step in (8, 16, 20):
        folder = spec.out / f"checkpoint/step-{step}"
        assert verify_checksums(folder) == 3, "a file of each rank, and the metadata"
        assert {path.name for path in folder.iterdir()} == {CHECKSUMS, ".metadata", "__0_0.distcp", "__1_0.distcp"}
    path = damage(kind, spec.out / "checkpoint/step-20")
    run_ranks(spec, tmp_path / "scratch")
    log = (spec.out / "logs/rank_0.log").read_text()
    assert f"the checkpoint of step 20 is damaged: {path}" in log and "damaged-20, and is not used" in log
    assert "Training starts at step 17" in log
    assert list_finished_checkpoints(spec.out) == [8, 16, 20] and (spec.out / "checkpoint/damaged-20").is_dir()
    ends = (find_final_checkpoint(out, STAGE.steps) for out in (spec.out, tmp_path / "undisturbed"))
    assert find_differences(*ends) == []
    assert [line["step"] for line in lines(spec.out, "metrics.jsonl")] == list(range(1, STAGE.steps + 1))


def test_a_stage_all_of_whose_checkpoints_are_damaged_does_not_start_over(data, whole, tmp_path):
    spec = stage_spec(data, tmp_path / "stage", world_size=1)
    shutil.copytree(whole, spec.out)
    for step in list_finished_checkpoints(spec.out):
        (spec.out / f"checkpoint/step-{step}/__0_0.distcp").unlink()
    with pytest.raises(RuntimeError, match=r"every checkpoint is damaged: .*step-20/__0_0\.distcp is missing"):
        run_ranks(spec, tmp_path / "scratch")
    assert list_finished_checkpoints(spec.out) == [8, 16, 20]


def test_a_stage_does_not_start_from_a_damaged_checkpoint(data, whole, tmp_path):
    shutil.copytree(whole / "checkpoint/step-20", tmp_path / "initial")
    spec = stage_spec(data, tmp_path / "stage", world_size=1, initial_checkpoint=tmp_path / "initial")
    content = (tmp_path / "initial/__0_0.distcp").read_bytes()
    (tmp_path / "initial/__0_0.distcp").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="which the stage starts from, is damaged"):
        run_ranks(spec, tmp_path / "scratch")


def test_a_checkpoint_of_an_older_version_is_held_to_the_sizes_of_its_metadata(whole, tmp_path):
    folder = tmp_path / "step-20"
    shutil.copytree(whole / "checkpoint/step-20", folder)
    assert find_damage(folder) is None
    (folder / CHECKSUMS).unlink()
    assert find_damage(folder) is None
    content = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(content[: len(content) // 2])
    assert "__0_0.distcp is missing, or shorter than" in find_damage(folder)
    (folder / ".metadata").write_bytes(b"rubbish")
    assert ".metadata cannot be read" in find_damage(folder)
