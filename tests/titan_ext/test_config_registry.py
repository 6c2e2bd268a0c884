"""The module as any torchtitan user starts it: by name, through torchrun, on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.stages import STAGES
from tests.titan_ext.stage_data import write_data
from titan_ext import config_registry
from titan_ext.config import FLAVORS
from titan_ext.training.schedules import published_stages

ROOT = str(Path(config_registry.__file__).parents[1])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"]


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_flavor_has_a_config_for_every_stage(flavor, stage):
    config = getattr(config_registry, f"mobilemoe_{flavor.lower()}_{stage}")()
    assert config.model_spec.flavor == flavor
    assert len(config.model_spec.model.layers) == FLAVORS[flavor].n_layers
    if flavor != "tiny":
        assert config.training.steps == published_stages()[stage].steps
        assert config.parallelism.expert_parallel_degree == 4


def test_ranks_that_expert_parallelism_does_not_divide_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="expert_parallel_degree = 4: the 1 ranks of a replica"):
        config_registry.mobilemoe_s_pretrain().build()


def test_torchrun_trains_tiny_by_name(tmp_path):
    write_data(tmp_path / "data", FLAVORS["tiny"].vocab_size, domains=("web", "math", "code", "knowledge", "science"))
    command = [
        *TORCHRUN, "-m", "torchtitan.train", "--module", "titan_ext", "--config", "mobilemoe_tiny_pretrain",
        "--training.steps", "2", "--training.global_batch_size", "4", "--training.local_batch_size", "2",
        "--validator.no-enable",
        "--training.seq_len", "64", "--metrics.log_freq", "5",
    ]  # fmt: skip
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[:6000]
    assert (tmp_path / "stages/1_pretrain/checkpoint/step-2/.metadata").is_file()
    lines = [json.loads(line) for line in (tmp_path / "stages/1_pretrain/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2], "the last step is that of the command line"
    logged = [float(tps.replace(",", "")) for tps in re.findall(r"tps: ([\d,]+)", done.stdout + done.stderr)]
    assert [line["tokens_per_second"] for line in lines] == pytest.approx(logged, rel=0.1)
