"""An interrupt: training writes a checkpoint before its workers are stopped, on Ray for real."""

import dataclasses
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from pipelines.commands import supervise
from pipelines.engine.stop_file import find_stop_file
from pipelines.ray.cluster import Cluster
from pipelines.recipe import ClusterConfig
from pipelines.steps.train import run_stage_on_worker
from tests.pipelines.test_ray import ROOT
from tests.titan_ext.stage_data import write_data
from tests.titan_ext.test_training import DIMS, STAGE, lines, stage_spec
from titan_ext.training.stage_spec import list_finished_checkpoints


def start_interrupt(condition):
    """Send this process a SIGINT, as Ctrl-C does, once the condition holds; return the thread that does it."""

    def wait():
        while not condition():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def display():
    said = []
    return SimpleNamespace(said=said, log_line=said.append, refresh=lambda: None)


@pytest.fixture(autouse=True)
def default_interrupt():
    """Tests that a shell started in the background ignore SIGINT."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_training_on_ray_writes_a_checkpoint_after_an_interrupt(display, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    data, run = write_data(tmp_path / "data", DIMS.vocab_size), tmp_path / "run"
    run.mkdir()
    stage = dataclasses.replace(STAGE, steps=10_000, checkpoint_interval=0, heldout_interval=10_000)
    spec = stage_spec(data, run / "stage", world_size=1, stage=stage, stop_file=find_stop_file(run))
    find_stop_file(run).touch()  # of a driver that was killed while it waited
    stop = threading.Event()
    with Cluster(ClusterConfig(max_failures=0), run, world_size=1) as cluster:
        start_interrupt(lambda: (spec.out / "metrics.jsonl").exists() and len(lines(spec.out, "metrics.jsonl")) > 3)
        with pytest.raises(KeyboardInterrupt):
            supervise.supervise(
                lambda: cluster.run_gang(run_stage_on_worker, spec, name="pretrain"), display, cluster, stop
            )
    assert stop.is_set() and not find_stop_file(run).exists()
    (step,) = list_finished_checkpoints(spec.out)
    assert 3 < step == len(lines(spec.out, "metrics.jsonl")) < 10_000
    assert "training writes a checkpoint" in display.said[0]


@pytest.mark.parametrize("again", [False, True])
def test_training_that_does_not_answer_is_stopped(again, display, tmp_path, monkeypatch):
    """After a while, or at once by a second interrupt. Without training nobody waits."""
    monkeypatch.setattr(supervise, "CHECKPOINT_PATIENCE_SECONDS", 600 if again else 0.5)
    cluster = SimpleNamespace(run=tmp_path, is_training=True)
    if again:
        start_interrupt(find_stop_file(tmp_path).exists)
    begin = time.monotonic()
    supervise.await_checkpoint(display, cluster)
    assert time.monotonic() - begin < 60 and len(display.said) == 1
    assert not find_stop_file(tmp_path).exists()
    cluster.is_training = False
    supervise.await_checkpoint(display, cluster)
    assert len(display.said) == 1
