"""The plan against figures worked out by hand."""

import pytest

from core.errors import RefusedInput
from data.planning import Rates, plan_data

RATES = Rates(clean=1.0, tokenize=5.0, cluster_seconds=10.0, cluster_bytes=100.0, signature_bytes=500.0)


def test_a_plan_worked_out_by_hand():
    # 7e9 tokens of 4.5 bytes are 31,500 MB of text and 10M documents; half the text falls away on the way.
    plan = plan_data(7e9, RATES, shard_bytes=1 << 26, kept=0.5)
    assert plan.documents == 20_000_000 and plan.text_bytes == 63_000_000_000
    assert plan.clean_core_hours == pytest.approx(63_000 / 3600)
    assert plan.tokenize_core_hours == pytest.approx(31_500 / 5 / 3600)
    assert plan.cluster_hours == pytest.approx(20 * 10 / 3600)
    assert plan.cluster_memory_bytes == 2_000_000_000
    assert plan.shards == 418  # 28e9 / 2^26 = 417.2
    assert plan.files == 423
    assert plan.storage_bytes == 12_250_000_000
    assert plan.shard_object_bytes == 2**26 / 4 * 1.75
    assert plan.peak_bytes == 21_000_000_000 + 10_000_000_000
    # 63 GB are 32 units of 2 GB; the largest takes 2,000 s to clean and 200 s to tokenize.
    assert plan.units == 32 and plan.longest_unit_hours == pytest.approx(2200 / 3600)
    assert plan.estimate_hours(16) == pytest.approx((17.5 + 1.75) / 16 + 200 / 3600)
    assert plan.estimate_hours(100) == pytest.approx(2200 / 3600 + 200 / 3600), "no faster than its longest unit"
    large = plan_data(7e9, RATES, kept=0.5, largest_unit=20e9)
    assert large.longest_unit_hours == pytest.approx(22_000 / 3600) and large.estimate_hours(32) > 6


def test_groups_bound_the_one_task_and_nothing_else():
    whole, parts = plan_data(1e12, RATES), plan_data(1e12, RATES, largest_group=1 / 64)
    assert parts.cluster_memory_bytes == pytest.approx(whole.cluster_memory_bytes / 64)
    assert parts.cluster_hours == pytest.approx(whole.cluster_hours / 64)
    assert (parts.peak_bytes, parts.clean_core_hours) == (whole.peak_bytes, whole.clean_core_hours)
    few = plan_data(1e12, RATES, largest_group=0.01, compared=0.05)
    assert few.peak_bytes == few.storage_bytes < whole.peak_bytes, "then the shards are the largest"


def test_twice_the_tokens_cost_twice_as_much():
    one, two = plan_data(1e12, RATES), plan_data(2e12, RATES)
    for name in ("documents", "clean_core_hours", "tokenize_core_hours", "cluster_memory_bytes", "storage_bytes"):
        assert getattr(two, name) == pytest.approx(2 * getattr(one, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tokens": 0}, "tokens is 0"), ({"kept": 0.0}, "kept is 0.0"), ({"largest_group": 2}, "largest_group is 2")],
)
def test_nonsense_is_refused(change, message):
    with pytest.raises(RefusedInput, match=message):
        plan_data(**{"tokens": 1e9, "rates": RATES} | change)
