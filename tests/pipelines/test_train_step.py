"""The step that trains a stage: what a rank does before the stage begins."""

import os
from types import SimpleNamespace

import torch

from pipelines.steps.train import run_stage_on_worker


def test_a_rank_computes_on_the_threads_that_its_environment_states(monkeypatch):
    """Whatever torch began with: another number of threads gives other last bits."""
    seen = []
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "3")
    monkeypatch.setattr("titan_ext.training.train.run_stage", lambda spec: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    assert before != 3
    run_stage_on_worker(SimpleNamespace())
    torch.set_num_threads(before)
    assert seen == [3]
