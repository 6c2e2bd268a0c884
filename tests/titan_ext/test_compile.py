"""Blocks compiled as on a GPU, one graph each, train as others do; here they are traced and run eagerly (aot_eager)."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.titan_ext.stage_data import write_data
from tests.titan_ext.test_training import DIMS, STAGE, lines
from titan_ext.config import ParallelConfig
from titan_ext.dtensor import local
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import build_stage_config

CASES = {
    "bfloat16, drop and pad, ep 2": ({"capacity_factor": 1.5}, {"world_size": 2, "expert_parallel": 2}),
    "bfloat16, dropless qat": ({"shards": "sft", "quantize": True}, {"world_size": 1}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), DIMS.vocab_size)


def train_compiled(spec: StageSpec) -> None:
    config = build_stage_config(dataclasses.replace(spec, parallel=dataclasses.replace(spec.parallel, compile=True)))
    config.compile.backend = "aot_eager"
    trainer = config.build()
    trainer.train()
    trainer.close()
    dist.destroy_process_group()


def train_watching_the_router(spec: StageSpec) -> None:
    trainer = build_stage_config(spec).build()
    gate = trainer.model_parts[0].layers["0"].moe.router.gate
    master = local(gate.weight)  # shares its memory with what the optimizer updates
    seen = []

    def watch(gate: torch.nn.Module, inputs: tuple) -> None:
        rows = gate.weight.detach().chunk(dist.get_world_size())[dist.get_rank()]
        seen.append((gate.weight.dtype == torch.float32, torch.equal(rows, master)))

    gate.register_forward_pre_hook(watch)
    trainer.train()
    trainer.close()
    (spec.out / f"router_{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.mark.parametrize(("changes", "layout"), CASES.values(), ids=CASES.keys())
def test_compiled_blocks_train_as_others(changes, layout, data, tmp_path):
    stage = dataclasses.replace(STAGE, steps=2, heldout_interval=2, checkpoint_interval=2, **changes)
    parallel = ParallelConfig(precision="bfloat16", **layout)
    specs = [
        StageSpec("pretrain", dataclasses.replace(DIMS, n_layers=1), stage, parallel, data, tmp_path / name, None, 0)
        for name in ("plain", "compiled")
    ]
    for spec, function in zip(specs, (train_watching_the_router, train_compiled), strict=True):
        run_ranks(spec, spec.out.with_name(f"scratch_{spec.out.name}"), function, timeout=400)
    plain, compiled = (lines(spec.out, "metrics.jsonl") for spec in specs)
    for key in ("loss", "grad_norm", "router_z", "dropped"):
        assert [line[key] for line in compiled] == pytest.approx([line[key] for line in plain], rel=2e-3), key
    for rank in range(parallel.world_size):
        seen = json.loads((specs[0].out / f"router_{rank}.json").read_text())
        assert seen and all(is_float and is_master for is_float, is_master in seen), "not what the optimizer updates"
