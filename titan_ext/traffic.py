"""This module counts the bytes that a rank receives in one micro-batch under a layout, by closed formulas.

FSDP2 gathers a layer's weights while the layer before computes, so its traffic hides behind the computation where the
network is fast enough. The experts of an MoE layer must wait for the tokens that expert parallelism exchanges, so that
traffic adds to the time of a step.
"""

from dataclasses import dataclass

from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.memory import BYTES, FLOAT32
from titan_ext.model_stats import count_parameters

WEIGHT_GATHERS = 2
"""Number of times that a layer's weights are gathered: for the forward and for the backward pass."""
TOKEN_EXCHANGES = 4
"""Number of times that the experts' rows cross the network: there and back, in the forward and the backward pass.
Selective recomputation keeps them; full recomputation exchanges them twice more."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in one micro-batch."""

    weights: int
    """Gathered weights, and gradients that are reduced in float32."""
    tokens: int
    """Rows of the routed experts that expert parallelism exchanges."""


def count_traffic(dims: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> Traffic:
    """Count what a rank receives. In a pipeline a rank has its share of the layers."""
    count, size = count_parameters(dims), BYTES[parallel.precision]
    shards = parallel.world_size // (parallel.data_parallel_replicate * parallel.pipeline_parallel)
    parts = max(parallel.expert_parallel, 1)
    dense = count.total - count.routed_experts
    moved = dense * (shards - 1) / shards + count.routed_experts / parts * (shards // parts - 1) / (shards // parts)
    tokens = stage.local_batch_size * stage.seq_len // (parallel.context_parallel * parallel.tensor_parallel)
    rows = tokens * dims.top_k * (stage.capacity_factor or 1) * dims.n_layers
    exchanges = TOKEN_EXCHANGES + (2 if parallel.activation_checkpoint == "full" else 0)
    return Traffic(
        weights=round((WEIGHT_GATHERS * size + FLOAT32) * moved / parallel.pipeline_parallel),
        tokens=round(exchanges * size * rows * dims.d_model * (parts - 1) / parts / parallel.pipeline_parallel),
    )
