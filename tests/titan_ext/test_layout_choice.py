"""Which layout is chosen for the published models, on which GPUs and over which network, and that options are kept."""

import math
from dataclasses import replace

import pytest

from titan_ext.cards import CARDS, Card, Machine, describe_machine
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.layout import AMPLE, EQUAL, describe_sharding, rank_layouts, settle_layout
from titan_ext.memory import estimate_memory
from titan_ext.roofline import FORWARD, Kernels, estimate_step
from titan_ext.traffic import HOP, count_traffic, time_traffic
from titan_ext.training.schedules import published_stages

STAGES = list(published_stages().values())
OPEN = ParallelConfig(world_size=64, expert_parallel=None, data_parallel_replicate=None)
WORLDS = {"S": 64, "M": 128, "L": 256}
FAST, SLOW, SLOWEST = 400, 50, 12.5
"""Gigabits a second of a GPU: a network card for each, one for all eight of a node, a quarter of one."""


def choose(flavor: str, world: int, gpu: str = "H100", gbits: float = FAST, **stated) -> str:
    parallel = replace(OPEN, world_size=world, **stated)
    return describe_sharding(settle_layout(FLAVORS[flavor], STAGES, parallel, describe_machine(gpu, gbits)))


@pytest.mark.parametrize("gpu", CARDS)
@pytest.mark.parametrize("flavor", WORLDS)
def test_a_node_and_a_fast_network(flavor, gpu):
    """Every GPU computes with all experts; the weights are sharded over a node."""
    world = WORLDS[flavor]
    assert choose(flavor, 8, gpu) == "EP 1, FSDP over 8"
    assert choose(flavor, world, gpu) == f"EP 1, HSDP, {world // 8} replicas of 8"


@pytest.mark.parametrize(
    ("flavor", "gpu", "gbits", "hybrid"),
    [
        # Where a slow network hides behind slow cards, it hides best in both passes: gathering is in both.
        ("S", "A100", SLOW, False), ("M", "A100", SLOW, False), ("L", "A100", SLOW, False),
        # Where it never hides, only a replica's gradients should wait for it.
        ("S", "H100", SLOW, True), ("M", "H200", SLOW, True), ("L", "H100", SLOW, True), ("L", "H200", SLOWEST, True),
        ("S", "A100", SLOWEST, True), ("L", "A100", SLOWEST, True),
    ],
)  # fmt: skip
def test_a_slow_network(flavor, gpu, gbits, hybrid):
    world = WORLDS[flavor]
    expected = f"HSDP, {world // 8} replicas of 8" if hybrid else f"FSDP over {world}"
    assert choose(flavor, world, gpu, gbits) == f"EP 1, {expected}"


def test_slow_links_within_a_node_are_left_to_fewer_weights():
    """Without NVLink, in small micro-batches, the weights of all experts take longer than their tokens."""
    machine = Machine(replace(CARDS["A100"], link=20e9))
    stages = [replace(stage, local_batch_size=1) for stage in STAGES]
    choice = rank_layouts(FLAVORS["L"], stages, replace(OPEN, world_size=8, compile=True), machine)
    best = choice.options[0]
    assert describe_sharding(best.parallel) == "EP 4, FSDP over 8"
    alone = next(option for option in choice.options if option.parallel.expert_ranks == 1)
    assert best.seconds * (1 + EQUAL) < alone.seconds and "slower" in choice.reason


def test_experts_that_eight_divides_may_be_shared_by_eight():
    def list_parts(dims):
        choice = rank_layouts(dims, STAGES, replace(OPEN, world_size=8), Machine())
        return {option.parallel.expert_ranks for option in choice.options}

    assert list_parts(replace(FLAVORS["S"], n_experts=64)) == {1, 2, 4, 8}
    assert list_parts(FLAVORS["S"]) == {1, 2, 4}, "8 does not divide 60"


def test_what_is_stated_stays():
    assert choose("S", 64, expert_parallel=4) == "EP 4, HSDP, 8 replicas of 8"
    assert choose("S", 64, expert_parallel=4, data_parallel_replicate=1) == "EP 4, FSDP over 64"
    assert choose("S", 64, data_parallel_replicate=1) == "EP 1, FSDP over 64"
    assert choose("S", 64, data_parallel_replicate=4) == "EP 1, HSDP, 4 replicas of 16"
    stated = replace(OPEN, activation_checkpoint="full", expert_parallel=2)
    settled = settle_layout(FLAVORS["S"], STAGES, stated, Machine())
    assert settled.activation_checkpoint == "full" and settled.expert_ranks == 2


def test_layouts_that_are_not_timed_and_the_cpu():
    split = replace(OPEN, tensor_parallel=2)
    assert describe_sharding(settle_layout(FLAVORS["S"], STAGES, split, Machine())) == "EP 1, HSDP, 8 replicas of 8"
    assert "not timed" in rank_layouts(FLAVORS["S"], STAGES, split, Machine()).reason
    assert describe_sharding(settle_layout(FLAVORS["S"], STAGES, OPEN, None)) == "EP 1, FSDP over 64"
    assert choose("S", 12) == "EP 1, FSDP over 12", "12 GPUs are no whole nodes"


def test_a_layout_that_does_not_fit_comes_last():
    dims, parallel = FLAVORS["L"], replace(OPEN, compile=True)
    wide = replace(parallel, expert_parallel=1, data_parallel_replicate=1, activation_checkpoint="full")
    peak = max(estimate_memory(dims, stage, wide).peak for stage in STAGES)
    several = rank_layouts(dims, STAGES, parallel, Machine(replace(Card(), memory=math.ceil(peak / (1 - AMPLE)))))
    fits = [option.fits for option in several.options]
    assert fits == sorted(fits, reverse=True) and len(set(fits)) == 2
    assert describe_sharding(several.options[0].parallel) == "EP 1, FSDP over 64"
    assert not any(option.fits for option in several.options if option.parallel.replicas == 8)
    tiny = rank_layouts(dims, STAGES, replace(parallel, world_size=8), Machine(replace(Card(), memory=8_000_000_000)))
    assert not tiny.options[0].fits and "and no layout leaves 25%" in tiny.reason


def test_the_reason_names_the_others():
    parallel = replace(OPEN, compile=True)
    choice = rank_layouts(FLAVORS["S"], STAGES, parallel, Machine())
    best, second = choice.options[0], choice.options[1]
    assert choice.reason.startswith("EP 1, HSDP, 8 replicas of 8 waits for the network in 0% of its time")
    assert "EP 2" in choice.reason and "slower" in choice.reason
    assert "EP 1, FSDP over 64" in choice.reason and f"as fast to {EQUAL:.0%}" in choice.reason
    assert second.seconds <= best.seconds * (1 + EQUAL) and second.traffic > best.traffic
    tokens = sum(stage.tokens for stage in STAGES)
    assert best.tokens_per_second == pytest.approx(tokens / 64 / best.seconds)


def test_the_time_of_traffic_by_hand():
    dims, stage = FLAVORS["S"], published_stages()["pretrain"]
    machine = Machine(replace(Card(), link=1e9), network_gbits=1 * 8 / 0.8)  # each 1 GB/s
    alone = ParallelConfig(world_size=8)
    hops = 7 * HOP * dims.n_layers
    weights = count_traffic(dims, stage, alone).weights / 8  # an eighth is a byte of each gathered parameter
    found = time_traffic(dims, stage, alone, machine)
    assert found.forward == pytest.approx(2 * weights / 1e9 + hops, rel=1e-6)
    assert found.backward == pytest.approx(6 * weights / 1e9 + 2 * hops, rel=1e-6) and found.tokens == 0
    hybrid = replace(alone, world_size=64, data_parallel_replicate=8)
    added = count_traffic(dims, stage, hybrid).replicas / 1e9 + 2 * hops
    assert time_traffic(dims, stage, hybrid, machine).backward == pytest.approx(max(found.backward, added), rel=1e-6)
    slower = replace(machine, network_gbits=machine.network_gbits / 100)
    added = count_traffic(dims, stage, hybrid).replicas / 1e7 + 2 * hops
    assert time_traffic(dims, stage, hybrid, slower).backward == pytest.approx(added, rel=1e-6)
    everywhere = time_traffic(dims, stage, replace(alone, world_size=64), slower).forward
    assert everywhere == pytest.approx(2 * weights * 8 / 7 * 63 / 64 / 8e7 + 9 * hops, rel=1e-6), "8 cards a node"
    shared = time_traffic(dims, stage, replace(alone, expert_parallel=4), machine)
    assert shared.tokens == count_traffic(dims, stage, replace(alone, expert_parallel=4)).tokens / 1e9
    assert shared.forward < found.forward


def test_a_step_waits_for_tokens_and_for_what_is_not_hidden():
    dims, stage = FLAVORS["S"], published_stages()["pretrain"]
    layout = ParallelConfig(world_size=8, expert_parallel=4, compile=True, activation_checkpoint="none")
    fast, slow = (estimate_step(dims, stage, layout, Machine(replace(Card(), link=rate))) for rate in (450e9, 2e9))
    assert fast.waiting == pytest.approx(fast.traffic.tokens)
    assert slow.waiting == pytest.approx(
        slow.traffic.tokens
        + slow.traffic.forward - FORWARD * slow.computing
        + slow.traffic.backward - (1 - FORWARD) * slow.computing
    )  # fmt: skip
    assert slow.total == slow.micro_batches * (slow.computing + slow.waiting) + slow.updating
    kernels = Kernels(dims, stage, layout, Card())
    alone = Kernels(dims, stage, replace(layout, expert_parallel=1), Card())
    assert kernels.count_fsdp_bytes() < alone.count_fsdp_bytes() and kernels.time_layer() <= alone.time_layer()
