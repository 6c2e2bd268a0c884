"""Decay branches trained for real: a branch equals a run of its own, what is finished is not trained again."""

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest

from core.errors import RefusedInput
from pipelines.ray.cluster import Cluster
from pipelines.recipe import ClusterConfig
from pipelines.scaling.sweep import tiny
from pipelines.scaling.sweep.grid import Grid, expand_sweep
from pipelines.scaling.sweep.train import (
    check_folders,
    list_tasks,
    measure_point,
    prepare_folder,
    read_finished,
    train_point_on_worker,
    train_points,
)
from tests.titan_ext.stage_data import find_differences, write_data
from titan_ext.model_stats import count_parameters
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import find_final_checkpoint

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 96


def make_runs(tokens, experts=(4,), granularity=(1,)):
    """Return recipe and runs of a sweep of 256 tokens a step, with 2 steps of warm-up and checkpoints 5 steps apart."""
    made = tiny.sweep()
    pretrain = dataclasses.replace(
        made.recipe.stages.pretrain, seq_len=64, global_batch_size=4, local_batch_size=4, warmup_steps=2,
        mixture={"web": 0.6, "code": 0.4}, checkpoint_interval=5, heldout_batches=2, log_interval=1,
    )  # fmt: skip
    recipe = dataclasses.replace(
        made.recipe,
        model=dataclasses.replace(made.recipe.model, vocab_size=VOCAB_SIZE, max_seq_len=64),
        stages=dataclasses.replace(made.recipe.stages, pretrain=pretrain),
    )
    grid = Grid(d_model=(32,), experts=experts, granularity=granularity, tokens=tuple(256.0 * n for n in tokens))
    return recipe, expand_sweep(dataclasses.replace(made, recipe=recipe, grids=(grid,), decay_fraction=0.4))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), VOCAB_SIZE)


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """The folder of a sweep whose data step is done."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "data").symlink_to(data)
    return folder


@pytest.fixture(scope="module")
def branched(out):
    """The tasks of one run with branches at 10 and 20 steps, trained one after the other."""
    (chain,) = list_tasks(*make_runs((10, 20)), out)
    for task in chain:
        prepare_folder(task, "data")
        run_ranks(task.spec, out / "scratch", train_point_on_worker)
    return chain


def test_a_branch_equals_a_run_that_decays_there(branched, out, tmp_path):
    first, second = branched
    assert (first.branch.start, second.branch.start) == (6, 12)
    alone = dataclasses.replace(second.spec, out=tmp_path / "alone")
    run_ranks(alone, tmp_path / "scratch", train_point_on_worker)
    checkpoints = [find_final_checkpoint(spec.out, 20) for spec in (alone, second.spec)]
    assert find_differences(*checkpoints) == []
    losses = [json.loads((spec.out / "heldout.jsonl").read_text().splitlines()[-1]) for spec in (alone, second.spec)]
    assert losses[0] == losses[1]
    steps = [json.loads(line)["step"] for line in (second.spec.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(7, 21)), "the plateau up to step 6 was trained by the first branch"


def test_the_rate_stays_on_the_plateau_and_falls_in_the_branch(branched):
    rates = {}
    for task in branched:
        for line in (task.spec.out / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            rates[task.name[-1], record["step"]] = record["lr"] / task.branch.stage.learning_rate
    assert rates["1", 6] == rates["1", 7] == rates["2", 7] == rates["2", 13] == pytest.approx(1)
    assert [rates["1", step] for step in (8, 9, 10)] == pytest.approx([0.75, 0.5, 0.25])
    assert rates["2", 20] == pytest.approx(1 / 8)


def test_the_checkpoint_of_the_plateau_outlives_the_decay(branched):
    kept = [sorted(path.name for path in (task.spec.out / "checkpoint").iterdir()) for task in branched]
    assert "step-6" in kept[0] and "step-12" in kept[1]


def test_a_point_is_measured_from_its_files(branched):
    _, second = branched
    point = measure_point(second)
    model = second.run.model
    assert (point.tokens, point.experts, point.granularity, point.shared_expert) == (5120, 4, 1, False)
    assert point.active == count_parameters(model).active and point.total == count_parameters(model).total
    assert point.train_flops == 6 * point.active * 5120
    assert 1e8 < point.peak_memory < 1e11 and point.step_seconds > 0
    assert point.loss == json.loads((second.spec.out / "heldout.jsonl").read_text().splitlines()[-1])["loss"]


def test_a_point_whose_folder_cannot_be_written_ends_its_own_run_only(branched, tmp_path):
    """The driver writes too. It never comes to the cluster here."""
    (tmp_path / "file").write_text("no folder")
    first, _ = branched
    blocked = dataclasses.replace(first, spec=dataclasses.replace(first.spec, out=tmp_path / "file" / "1"))
    lines = []
    failures = train_points(None, [[blocked]], "data", at_once=1, log_line=lines.append, stop=threading.Event())
    assert len(failures) == 1 and "Not a directory" in failures[0] and len(lines) == 1


def test_a_folder_of_another_sweep_is_refused(branched, out):
    recipe, runs = make_runs((10, 20))
    check_folders(list_tasks(recipe, runs, out), "data")
    for changed, name in (((dataclasses.replace(recipe, seed=1), runs), "seed"), ((recipe, runs), "data")):
        with pytest.raises(RefusedInput, match=f"a point of another sweep .other {name}"):
            check_folders(list_tasks(*changed, out), "data" if name == "seed" else "other data")


def test_runs_side_by_side_on_ray_of_which_one_fails_and_the_rest_is_not_trained_again(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "data").symlink_to(data)
    recipe, runs = make_runs((10, 14), experts=(1, 4))
    chains = list_tasks(recipe, runs, tmp_path)
    blocked = next(chain for chain in chains if chain[0].run.experts == 4)[0].spec.out
    blocked.mkdir(parents=True)
    (blocked / "logs").write_text("no folder")
    lines = []
    with Cluster(ClusterConfig(max_failures=0, cpus_per_task=1), tmp_path, world_size=1) as cluster:
        failures = train_points(cluster, chains, "data", at_once=2, log_line=lines.append, stop=threading.Event())
        assert len(failures) == 1 and failures[0].startswith("d32_E4_g1/1: ")
        assert [(point.name, point.tokens) for point in read_finished(chains)] == [
            ("d32_E1_dense", 2560), ("d32_E1_dense", 3584)
        ]  # fmt: skip
        (blocked / "logs").unlink()
        before = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("points/*dense/*/point.json")}
        assert len(before) == 2
        assert train_points(cluster, chains, "data", at_once=2, log_line=lines.append, stop=threading.Event()) == []
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert len(read_finished(chains)) == 4
    left = [path.name for path in (tmp_path / "points/d32_E4_g1/1/checkpoint").iterdir()]
    assert left == ["step-10"], "once the next branch has ended, only the last checkpoint of a point is kept"
    assert sum(line.startswith("point ") for line in lines) == 4
