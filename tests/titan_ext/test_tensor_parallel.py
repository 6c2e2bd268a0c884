"""Tensor and expert parallelism under both of torchtitan's backends: every gradient and bias is that of one process.

The CPU trains with `partial_dtensor`, and GPUs with `spmd_types`. A gradient that is added up over too few or too many
ranks does not show in the loss of the step. torchtitan #4054: below experts that tensor parallelism splits, it was one
rank's part of the sum. torchtitan #4154: the expert bias saw one rank's tokens.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.titan_ext.first_step import save_first_step
from tests.titan_ext.stage_data import write_data
from tests.titan_ext.test_training import DIMS, STAGE
from titan_ext.config import ParallelConfig
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec

LAYOUTS = {
    "tp 2": {"world_size": 2, "tensor_parallel": 2},
    "ep 2": {"world_size": 2, "expert_parallel": 2},
    "tp 2, ep 2": {"world_size": 2, "tensor_parallel": 2, "expert_parallel": 2},
}
EXPERT_BIAS_UPDATE_RATE = 0.25


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


def take_first_step(layout: dict, backend: str, data: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return what `save_first_step` wrote: every rank has all sequences, or its half of them."""
    parallel = ParallelConfig(precision="float32", **layout)
    stage = dataclasses.replace(
        STAGE, router_z_loss=1.0, expert_bias_update_rate=EXPERT_BIAS_UPDATE_RATE,
        local_batch_size=STAGE.global_batch_size // parallel.data_parallel,
    )  # fmt: skip
    spec = StageSpec(backend, DIMS, stage, parallel, data, folder / "stage", initial_checkpoint=None, seed=0)
    run_ranks(spec, folder / "scratch", save_first_step)
    return load_file(spec.out / "first_step.safetensors")


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    return take_first_step({"world_size": 1}, "partial_dtensor", data, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("backend", ["partial_dtensor", "spmd_types"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_gradient_and_bias_is_that_of_one_process(layout, backend, data, one_process, tmp_path):
    found = take_first_step(layout, backend, data, tmp_path)
    assert found.keys() == one_process.keys()
    errors = {name: float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in one_process.items()}
    assert max(errors.values()) < 1e-5, errors
    assert one_process["layers.0.expert_bias"].abs().max() > 0.2
