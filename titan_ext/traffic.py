"""This module counts the bytes that a rank receives in one micro-batch under a layout, and the time that they take.

FSDP2 gathers a layer's weights while the layer before computes, so its traffic hides behind the computation where the
network is fast enough. The experts of an MoE layer must wait for the tokens that expert parallelism exchanges, so that
traffic adds to the time of a step.

Ranks are numbered node by node, and torchtitan's innermost axes are those of expert parallelism, then of the shards, so
a group of few ranks lies within a node. In a ring over several nodes, each GPU of a node that takes part brings in its
share over its own part of the network and passes it on within the node. So weights that 8 GPUs of each node gather come
into a node once, as do the experts' weights when 2 GPUs of each node gather a quarter of them each.
"""

from dataclasses import dataclass

from titan_ext.cards import GPUS_PER_NODE, Machine
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.memory import BYTES, FLOAT32
from titan_ext.model_stats import count_parameters

WEIGHT_GATHERS = 2
"""Number of times that a layer's weights are gathered: for the forward and for the backward pass."""
TOKEN_EXCHANGES = 4
"""Number of times that the experts' rows cross the network: there and back, in the forward and the backward pass.
Selective recomputation keeps them; full recomputation exchanges them twice more."""


HOP = 5e-6
"""Seconds that a step of a ring takes beside its bytes, assumed."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in one micro-batch."""

    weights: int
    """Gathered weights, and gradients that are reduced in float32."""
    replicas: int
    """Shards of float32 gradients that the replicas of HSDP add up."""
    tokens: int
    """Rows of the routed experts that expert parallelism exchanges."""


@dataclass(frozen=True)
class TrafficTime:
    """Seconds that the traffic of one micro-batch takes, if nothing else is on the network."""

    forward: float
    """Weights that are gathered in the forward pass."""
    backward: float
    """Weights that are gathered in the backward pass, and gradients that are reduced."""
    tokens: float
    """Rows of the routed experts."""


def count_traffic(dims: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> Traffic:
    """Count what a rank receives under a settled layout. In a pipeline a rank has its share of the layers."""
    size, replicas = BYTES[parallel.precision], parallel.replicas
    moved = sum(weights * (ranks - 1) / ranks for weights, ranks, _ in _list_groups(dims, parallel))
    tokens = stage.local_batch_size * stage.seq_len // (parallel.context_parallel * parallel.tensor_parallel)
    rows = tokens * dims.top_k * (stage.capacity_factor or 1) * dims.n_layers
    exchanges = TOKEN_EXCHANGES + (2 if parallel.activation_checkpoint == "full" else 0)
    kept_away = (parallel.expert_ranks - 1) / parallel.expert_ranks
    shard = count_parameters(dims).total / count_shards(parallel)
    return Traffic(
        weights=round((WEIGHT_GATHERS * size + FLOAT32) * moved / parallel.pipeline_parallel),
        replicas=round(2 * FLOAT32 * shard * (replicas - 1) / replicas / parallel.pipeline_parallel),
        tokens=round(exchanges * size * rows * dims.d_model * kept_away / parallel.pipeline_parallel),
    )


def time_traffic(dims: ModelDims, stage: StageConfig, parallel: ParallelConfig, machine: Machine) -> TrafficTime:
    """Return how long a rank's traffic takes under a settled layout without a pipeline."""
    size, layers, groups = BYTES[parallel.precision], dims.n_layers, _list_groups(dims, parallel)
    gathered = sum(_time_ring(size * weights, ranks, stride, layers, machine) for weights, ranks, stride in groups)
    reduced = sum(_time_ring(FLOAT32 * weights, ranks, stride, layers, machine) for weights, ranks, stride in groups)
    shards, replicas = count_shards(parallel), parallel.replicas
    shard = count_parameters(dims).total / shards
    added = 2 * _time_ring(FLOAT32 * shard, replicas, shards, layers, machine)
    # Shards within a node and replicas on several use different links at the same time.
    backward = max(gathered + reduced, added) if shards <= GPUS_PER_NODE else gathered + reduced + added
    tokens = count_traffic(dims, stage, parallel).tokens / find_rate(parallel.expert_ranks, 1, machine)
    return TrafficTime(forward=gathered, backward=backward, tokens=tokens)


def count_shards(parallel: ParallelConfig) -> int:
    """Return the number of ranks over which a replica's dense weights are sharded."""
    return parallel.world_size // (parallel.replicas * parallel.pipeline_parallel)


def find_rate(ranks: int, stride: int, machine: Machine) -> float:
    """Return the bytes a second that a rank receives in a ring of `ranks` ranks whose numbers are `stride` apart."""
    if ranks * stride <= GPUS_PER_NODE:
        return machine.card.link
    of_a_node = max(1, GPUS_PER_NODE // stride)
    return min(machine.card.link, machine.network * of_a_node)


def _list_groups(dims: ModelDims, parallel: ParallelConfig) -> list[tuple[float, int, int]]:
    """Return for the weights that a rank gathers together: their number, over how many ranks, and how far apart.

    Under expert parallelism dense and expert weights are sharded over different ranks, else a block is one gathering.
    """
    count, shards, parts = count_parameters(dims), count_shards(parallel), parallel.expert_ranks
    dense = count.total - count.routed_experts
    if parts == 1:
        return [(count.total, shards, 1)]
    return [(dense, shards, 1), (count.routed_experts / parts, shards // parts, parts)]


def _time_ring(size: float, ranks: int, stride: int, rings: int, machine: Machine) -> float:
    """Return the time in which `ranks` ranks gather, or reduce to shards, `size` bytes in `rings` equal parts."""
    return (ranks - 1) * (size / ranks / find_rate(ranks, stride, machine) + HOP * rings)
