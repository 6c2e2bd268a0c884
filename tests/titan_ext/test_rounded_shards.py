"""Weights rounded on the shards, before they are gathered, against rounding afterwards; one gradient of the head.

The loss of the output projection (titan_ext/training/head_loss.py) is compared with torchtitan's on the same ranks.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp_groups
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config.configs import CommConfig
from torchtitan.trainer import Trainer

from tests.titan_ext.stage_data import write_data
from tests.titan_ext.test_training import DIMS, STAGE
from titan_ext.config import ParallelConfig
from titan_ext.dtensor import local
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import round_to_int4
from titan_ext.quantization.qat import QATModule, fake_quantize_weight
from titan_ext.quantization.shards import group_weight, round_groups
from titan_ext.training.head_loss import HeadLoss
from titan_ext.training.launch import run_ranks
from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import build_stage_config
from titan_ext.training.trainer import StageTrainer

T = TypeVar("T")


def make_spec(folder: Path, world_size: int) -> StageSpec:
    data = write_data(folder / "data", DIMS.vocab_size)
    stage = dataclasses.replace(
        STAGE, steps=3, shards="sft", local_batch_size=1, global_batch_size=2 * world_size, quantize=True
    )
    quantization = QuantizationConfig(group_size=32, expert_group_axis="out")
    parallel = ParallelConfig(world_size=world_size, precision="bfloat16")
    dims = dataclasses.replace(DIMS, n_layers=1)
    return StageSpec(
        "qat", dims, stage, parallel, data, folder / "stage", initial_checkpoint=None, seed=0, quantization=quantization
    )


def go_both_ways(trainer: StageTrainer, inputs: dict, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return loss and this rank's shards of the gradients."""
    trainer.optimizers.zero_grad()
    loss = Trainer.forward_backward_step(
        trainer, input_dict=dict(inputs), labels=labels, global_valid_tokens=(labels != -100).sum()
    )
    gradients = {name: local(p.grad).clone() for name, p in trainer.model_parts[0].named_parameters()}
    return {"loss": loss.detach().clone()} | gradients


def count_reductions(function: Callable[[], T]) -> tuple[int, T]:
    """Return how often FSDP2 reduces gradients in a call, and what the call returns."""
    with patch.object(fsdp_groups, "foreach_reduce", wraps=fsdp_groups.foreach_reduce) as reduce:
        result = function()
    return reduce.call_count, result


def compare_with_rounding_afterwards(spec: StageSpec) -> None:
    """Write what differs in any bit, on weights that the optimizer has updated, and the roundings of the steps."""
    trainer = build_stage_config(spec).build()
    shards, batches = trainer.rounded_shards, trainer.batch_generator(trainer.dataloader)
    counts, round_once = [], shards._round

    def count(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        counts[-1] += 1
        return round_once(groups, dtype)

    shards._round = count
    for _ in range(2):
        counts.append(0)
        trainer.step += 1
        trainer.train_step(batches)
    inputs, labels = next(iter(trainer.dataloader))
    counts.append(0)
    before = go_both_ways(trainer, inputs, labels)
    modules = [module for module in trainer.model_parts[0].modules() if isinstance(module, QATModule)]
    assert modules and not any(module.rounds_weights for module in modules)
    shards._round = lambda groups, dtype: groups.to(dtype)
    for module in modules:
        module.rounds_weights = True
    after = go_both_ways(trainer, inputs, labels)
    ours = count_reductions(lambda: go_both_ways(trainer, inputs, labels))
    with patch.object(HeadLoss, "__call__", ChunkedLossWrapper.__call__):
        theirs = count_reductions(lambda: go_both_ways(trainer, inputs, labels))
    errors = {name: float((ours[1][name] - value).norm() / value.norm()) for name, value in theirs[1].items()}
    different = [name for name, value in after.items() if not torch.equal(before[name], value)]
    experts = trainer.model_parts[0].layers["0"].moe.routed_experts.inner_experts
    found = {"different": different, "counts": counts, "compared": len(after), "rows": len(local(experts.w1_EFD))}
    found |= {"reductions": (ours[0], theirs[0]), "error": max(errors.values())}
    (spec.out / f"found_{dist.get_rank()}.json").write_text(json.dumps(found))
    trainer.close()
    dist.destroy_process_group()


def test_rounded_shards_give_the_bits_of_rounded_weights_once_a_step(tmp_path):
    """Eight experts on three ranks: the last rank has fewer than the others."""
    spec = make_spec(tmp_path, world_size=3)
    run_ranks(spec, tmp_path / "scratch", compare_with_rounding_afterwards)
    weights = 4 + 3 + 3 + 1  # attention, shared expert, experts, and the embedding, which is the head
    found = [json.loads((spec.out / f"found_{rank}.json").read_text()) for rank in range(3)]
    assert [rank["rows"] for rank in found] == [3, 3, 2]
    for rank in found:
        assert rank["different"] == [] and rank["compared"] > weights
        assert rank["counts"] == [weights] * 3, "two steps of two micro-batches, and one forward pass outside of a step"
        ours, torchtitans = rank["reductions"]
        assert ours == torchtitans - 1 == 3, "a block and its router, and the embedding with the head"
        assert rank["error"] < 2e-2, "sums are rounded to bfloat16 in another order"


def note_who_rounds(spec: StageSpec) -> None:
    os.environ["NGPU"] = os.environ["WORLD_SIZE"]  # where torchtitan looks for the size of a fake world
    config = build_stage_config(spec)
    config.comm = CommConfig(mode="fake_backend")
    config.checkpoint.enable = config.validator.enable = False
    trainer = config.build()
    names = {
        name: module.rounds_weights
        for name, module in trainer.model_parts[0].named_modules()
        if isinstance(module, QATModule)
    }
    (spec.out / "names.json").write_text(json.dumps(names))
    trainer.close()
    dist.destroy_process_group()


def test_a_module_rounds_where_shards_cut_its_groups(tmp_path):
    """Sixteen ranks shard the rows of eight experts, two of 32 for each; `out` groups all 32."""
    spec = make_spec(tmp_path, world_size=16)
    run_ranks(spec, tmp_path / "scratch", note_who_rounds, ranks=[0])
    names = json.loads((spec.out / "names.json").read_text())
    assert [name for name, rounds in names.items() if rounds] == ["layers.0.moe.routed_experts.inner_experts"]
    assert len(names) == 4 + 3 + 1 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "axis"), [((6, 64), -1), ((3, 64, 48), -2), ((0, 64, 48), -2), ((0, 64), -1)])
def test_rounded_groups_are_the_weights_that_qat_would_round(shape, axis, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = group_weight(weight, axis % weight.dim(), 32)
    assert groups.shape[1] == 32
    rounded = round_groups(groups, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.view(shape), fake_quantize_weight(weight.to(dtype), 32, axis))
    if weight.numel():
        assert not torch.equal(rounded.view(shape).float(), weight)


def test_the_cast_before_the_rounding_matters():
    """Were it left out, as a compiler that fuses it does, other weights would be trained than exported."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    rounded = round_groups(group_weight(weight, 1, 32), torch.bfloat16).view(64, 64)
    assert (rounded != round_to_int4(weight, 1, 32).bfloat16()).any()
