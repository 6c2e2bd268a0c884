"""The roofline against arithmetic by hand and a second implementation of its formulas."""

import dataclasses

import pytest

from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.model_stats import training_flops_per_token
from titan_ext.roofline import Card, Kernels, estimate_tokens_per_second
from titan_ext.training.schedules import published_stages

ALONE = ParallelConfig(world_size=1).settle(on_gpu=True)


def compute(flavor: str, name: str, micro_batches: int = 8, **layout) -> float:
    stage = published_stages()[name]
    stage = dataclasses.replace(stage, global_batch_size=stage.local_batch_size * micro_batches)
    return estimate_tokens_per_second(FLAVORS[flavor], stage, dataclasses.replace(ALONE, **layout))


@pytest.mark.parametrize(
    ("flavor", "stage", "expected"),
    [
        ("S", "pretrain", 52_635), ("M", "pretrain", 29_361), ("L", "pretrain", 18_221), ("S", "midtrain", 47_089),
        ("L", "midtrain", 16_434), ("S", "sft", 54_790), ("L", "sft", 18_858), ("S", "qat", 43_205),
    ],
)  # fmt: skip
def test_a_second_implementation_gives_the_same(flavor, stage, expected):
    """It is a script that counts kernel by kernel, and the choice of experts too."""
    assert compute(flavor, stage) == pytest.approx(expected, rel=0.025)


def test_a_product_takes_what_its_flops_or_its_bytes_take():
    card = Card(peak=100.0, bandwidth=100.0, dense=0.5)
    kernels = Kernels(FLAVORS["S"], published_stages()["pretrain"], ALONE, card)
    assert kernels.multiply(10, 10, 10, card.dense) == 2000 / 50 > 600 / 100
    assert kernels.multiply(10, 1, 1, card.dense) == 2 * (10 + 10 + 1) / 100 > 20 / 50
    assert kernels.multiply(10, 1, 1, card.dense, groups=5) == 2 * (10 + 10 + 5) / 100


def test_no_rate_is_above_the_peak_and_less_work_is_faster():
    flops = training_flops_per_token(FLAVORS["S"], 2048)
    assert compute("S", "pretrain") * flops < Card().peak / 2
    rates = [compute("S", "pretrain", activation_checkpoint=name) for name in ("none", "selective", "full")]
    assert rates == sorted(rates, reverse=True)
    assert compute("S", "qat") < compute("S", "sft") and compute("S", "pretrain", 1) < compute("S", "pretrain", 8)


@pytest.mark.parametrize(
    "layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"compile": False}, {"precision": "float32"}]
)
def test_layouts_without_an_answer(layout):
    stage = published_stages()["pretrain"]
    assert estimate_tokens_per_second(FLAVORS["S"], stage, dataclasses.replace(ALONE, world_size=8, **layout)) is None
