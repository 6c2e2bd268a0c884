"""The roofline against arithmetic by hand and a second implementation of its formulas."""

import dataclasses

import pytest

from benchmarks.gpu.share_of_peak import compute_share
from titan_ext.cards import Card
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.model_stats import count_parameters, training_flops_per_token
from titan_ext.roofline import Kernels, estimate_tokens_per_second
from titan_ext.training.schedules import published_stages

ALONE = ParallelConfig(world_size=1, activation_checkpoint="selective", compile=True)


def compute(flavor: str, name: str, micro_batches: int = 8, **layout) -> float:
    stage = published_stages()[name]
    stage = dataclasses.replace(stage, global_batch_size=stage.local_batch_size * micro_batches)
    return estimate_tokens_per_second(FLAVORS[flavor], stage, dataclasses.replace(ALONE, **layout))


@pytest.mark.parametrize(
    ("flavor", "stage", "selective", "none"),
    [
        ("S", "pretrain", 120_728, 128_448), ("M", "pretrain", 64_833, 69_112), ("L", "pretrain", 38_346, 40_871),
        ("S", "midtrain", 95_052, 99_774), ("L", "midtrain", 31_207, 32_858), ("S", "sft", 89_015, 92_418),
        ("L", "sft", 28_707, 29_897), ("S", "qat", 94_099, 98_258),
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


def test_a_float8_product_by_hand():
    stage = dataclasses.replace(published_stages()["sft"], float8=True)
    slow = Card(float8_peak=1.0, bandwidth=1e30)
    assert Kernels(FLAVORS["S"], stage, ALONE, slow).train_product(4, 3, 2, 0.5, passes=3) == pytest.approx(
        3 * 48 / 0.5
    )
    narrow = Card(float8_peak=1e30, bandwidth=1.0)
    kernels = Kernels(FLAVORS["S"], stage, ALONE, narrow)
    products = 3 * (8 + 5 * 6 + 2 * 12)
    rounded = 3 * (8 + 30) + 3 * (12 + 30) + 5 * (12 + 8)  # forward; input's gradient; weights' gradient
    assert kernels.train_product(4, 3, 2, 0.5, passes=3, groups=5) == pytest.approx(products + rounded)
    plain = Kernels(FLAVORS["S"], dataclasses.replace(stage, float8=False), ALONE, narrow)
    assert plain.train_product(4, 3, 2, 0.5, passes=3.5) == 3.5 * plain.multiply(4, 3, 2, 0.5)


def test_rows_move_as_often_as_the_kernels_read_and_write_them():
    """Counted by hand for one byte a second: of 4 tokens, 2 experts each, 12 rows, bfloat16 rows of width 768."""
    stage = dataclasses.replace(published_stages()["pretrain"], local_batch_size=1, seq_len=4, capacity_factor=1.5)
    dims = dataclasses.replace(FLAVORS["S"], top_k=2, n_experts=4)
    kernels = Kernels(dims, stage, ALONE, Card(bandwidth=1.0))
    assert kernels.rows == 12
    forward, sums = (12 + 12) + (8 + 4), (8 + 4) + (12 + 12 + 12)
    assert kernels.gather_rows(redone=False) == 2 * 768 * (forward + sums)
    assert kernels.gather_rows(redone=True) == 2 * 768 * (forward + 24 + sums)


def test_fsdps_passes_are_those_of_its_code():
    """Counted by hand for one byte a second and one parameter a byte, as FSDP2 copies in torch 2.14."""
    stages, total = published_stages(), count_parameters(FLAVORS["S"]).total
    reduced = (2 + 4) + (4 + 4 + 4)
    for ranks, name, cast, sent in ((1, "sft", 4 + 2, 0), (4, "sft", 4 + 2, 0), (1, "qat", 0, 0), (4, "qat", 0, 2 + 2)):
        layout = dataclasses.replace(ALONE, world_size=ranks)
        kernels = Kernels(FLAVORS["S"], stages[name], layout, Card(bandwidth=1.0))
        gathered = (cast + sent) / ranks + (2 + 2)
        assert kernels.count_fsdp_bytes() == pytest.approx(total * (2 * gathered + reduced)), (ranks, name)


@pytest.mark.parametrize("flavor", ["S", "M", "L"])
@pytest.mark.parametrize("layout", [{}, {"world_size": 64, "data_parallel_replicate": 8}])
def test_qat_is_at_most_a_quarter_slower_than_the_plain_step(flavor, layout):
    for recomputation in ("none", "selective"):
        rates = [compute(flavor, name, activation_checkpoint=recomputation, **layout) for name in ("sft", "qat")]
        assert 0.85 < rates[0] / rates[1] < 1.25, (recomputation, rates)


@pytest.mark.parametrize("flavor", ["S", "M"])
def test_the_share_of_the_peak_is_what_was_aimed_at(flavor):
    for name, aim in (("pretrain", 0.28), ("midtrain", 0.25), ("sft", 0.25), ("qat", 0.25)):
        rate, share = compute_share(flavor, name)
        assert rate == compute(flavor, name, activation_checkpoint="none")
        assert aim < share < 0.35, (name, share)


def test_no_rate_is_above_the_peak_and_less_work_is_faster():
    flops = training_flops_per_token(FLAVORS["S"], 2048)
    assert compute("S", "pretrain") * flops < Card().peak / 2
    rates = [compute("S", "pretrain", activation_checkpoint=name) for name in ("none", "selective", "full")]
    assert rates == sorted(rates, reverse=True)
    assert compute("S", "pretrain", 1) < compute("S", "pretrain", 8)


@pytest.mark.parametrize(
    "layout", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"compile": False}, {"precision": "float32"}]
)
def test_layouts_without_an_answer(layout):
    stage = published_stages()["pretrain"]
    assert estimate_tokens_per_second(FLAVORS["S"], stage, dataclasses.replace(ALONE, world_size=8, **layout)) is None
