"""The roofline against arithmetic by hand and a second implementation of its formulas."""

import dataclasses

import pytest

from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.model_stats import training_flops_per_token
from titan_ext.roofline import Card, Kernels, estimate_tokens_per_second
from titan_ext.training.schedules import published_stages

ALONE = ParallelConfig(world_size=1, activation_checkpoint="selective", compile=True)


def compute(flavor: str, name: str, micro_batches: int = 8, **layout) -> float:
    stage = published_stages()[name]
    stage = dataclasses.replace(stage, global_batch_size=stage.local_batch_size * micro_batches)
    return estimate_tokens_per_second(FLAVORS[flavor], stage, dataclasses.replace(ALONE, **layout))


@pytest.mark.parametrize(
    ("flavor", "stage", "selective", "none"),
    [
        ("S", "pretrain", 121_440, 129_255), ("M", "pretrain", 66_040, 70_485), ("L", "pretrain", 39_400, 42_070),
        ("S", "midtrain", 95_493, 100_260), ("L", "midtrain", 31_901, 33_629), ("S", "sft", 90_364, 93_872),
        ("L", "sft", 29_950, 31_247), ("S", "qat", 62_655, 64_322),
    ],
)  # fmt: skip
def test_a_second_implementation_gives_the_same(flavor, stage, selective, none):
    """It is a script that counts kernel by kernel."""
    assert compute(flavor, stage) == pytest.approx(selective, rel=0.01)
    assert compute(flavor, stage, activation_checkpoint="none") == pytest.approx(none, rel=0.01)


def test_a_product_takes_what_its_flops_or_its_bytes_take():
    card = Card(peak=100.0, bandwidth=100.0, dense=0.5)
    kernels = Kernels(FLAVORS["S"], published_stages()["pretrain"], ALONE, card)
    assert kernels.multiply(10, 10, 10, card.dense) == 2000 / 50 > 600 / 100
    assert kernels.multiply(10, 1, 1, card.dense) == 2 * (10 + 10 + 1) / 100 > 20 / 50
    assert kernels.multiply(10, 1, 1, card.dense, groups=5) == 2 * (10 + 10 + 5) / 100


def test_rows_move_as_often_as_the_kernels_read_and_write_them():
    """Counted by hand for one byte a second: of 4 tokens, 2 experts each, 12 rows, bfloat16 rows of width 768."""
    stage = dataclasses.replace(published_stages()["pretrain"], local_batch_size=1, seq_len=4, capacity_factor=1.5)
    dims = dataclasses.replace(FLAVORS["S"], top_k=2, n_experts=4)
    kernels = Kernels(dims, stage, ALONE, Card(bandwidth=1.0))
    assert kernels.rows == 12
    forward, sums = (12 + 12) + (8 + 4), (8 + 4) + (12 + 12 + 12)
    assert kernels.gather_rows(redone=False) == 2 * 768 * (forward + sums)
    assert kernels.gather_rows(redone=True) == 2 * 768 * (forward + 24 + sums)


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
