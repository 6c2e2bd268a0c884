"""This module computes the tokens a second of one GPU by a roofline: a kernel takes as long as its FLOPs or its bytes.

It is arithmetic, and was never compared with a run. The peak and the bandwidth were measured on an H100; the shares of
them that kernels reach are assumed. It leaves out the network, the host and waits, so a real step takes longer. Kernels
are those of compiled blocks.

Letters: T tokens of a micro-batch, K experts a token, R rows of the routed experts, D model dimension.
"""

import math
from dataclasses import dataclass

from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.model_stats import count_parameters

BFLOAT16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Card:
    """The speeds that a GPU reaches."""

    name: str = "H100"
    peak: float = 790e12
    """FLOPs a second of large bfloat16 products, measured."""
    float32_peak: float = 45e12
    """FLOPs a second of float32 products, assumed."""
    bandwidth: float = 3.0e12 * 0.85
    """Bytes a second: 3.0 TB/s measured, of which kernels are assumed to reach 85%."""
    dense: float = 0.75
    """Share of the peak that dense products reach; this and the next are assumed."""
    grouped: float = 0.60
    attention: tuple[float, float] = (0.45, 0.35)
    """Shares that the forward and the backward pass of flex attention reach."""
    choice: float = 15e-9
    """Seconds a token of a layer's choice of experts, assumed: small kernels that sort, far from either peak."""


def estimate_tokens_per_second(
    dims: ModelDims, stage: StageConfig, parallel: ParallelConfig, card: Card | None = None
) -> float | None:
    """Return the tokens a second of one rank; None for layouts that split a sequence or the layers.

    Args:
        parallel: layout with recomputation and compile settled (`titan_ext.layout.settle_layout`).
    """
    split = parallel.tensor_parallel * parallel.context_parallel * parallel.pipeline_parallel
    if split > 1 or not parallel.compile or parallel.precision != "bfloat16":
        return None
    kernels = Kernels(dims, stage, parallel, card or Card())
    micro_batches = stage.global_batch_size / (stage.local_batch_size * parallel.data_parallel)
    shard = count_parameters(dims).total / (parallel.world_size // parallel.data_parallel_replicate)
    update = shard * 10 * FLOAT32 / kernels.card.bandwidth  # AdamW reads and writes 7 values, norm and clipping 3
    seconds = (dims.n_layers * kernels.time_layer() + kernels.time_rest()) * micro_batches + update
    return kernels.tokens * micro_batches / seconds


@dataclass(frozen=True)
class Kernels:
    """Times of the kernels of one micro-batch, in seconds."""

    dims: ModelDims
    stage: StageConfig
    parallel: ParallelConfig
    card: Card

    @property
    def tokens(self) -> int:
        """Return T."""
        return self.stage.local_batch_size * self.stage.seq_len

    @property
    def rows(self) -> int:
        """Return R, padding included."""
        chosen = self.tokens * self.dims.top_k
        if self.stage.capacity_factor is None:
            return chosen
        return self.dims.n_experts * math.ceil(self.stage.capacity_factor * chosen / self.dims.n_experts)

    def multiply(self, m: int, n: int, k: int, efficiency: float, groups: int = 1) -> float:
        """Return the time of a bfloat16 product [m, k] x [k, n], the rows divided among `groups` matrices."""
        flops, moved = 2 * m * n * k, BFLOAT16 * (m * k + m * n + groups * n * k)
        return max(flops / (self.card.peak * efficiency), moved / self.card.bandwidth)

    def move(self, size: float) -> float:
        """Return the time that reading and writing `size` bytes takes."""
        return size / self.card.bandwidth

    def time_layer(self) -> float:
        """Return the time of one layer's forward and backward pass, recomputation included."""
        dims, card, T, R = self.dims, self.card, self.tokens, self.rows
        D, F, S = dims.d_model, dims.expert_hidden, dims.shared_hidden
        q_width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
        again = {"none": 0.0, "selective": 0.5, "full": 1.0}[self.parallel.activation_checkpoint or "none"]
        projections = sum(
            self.multiply(T, n, k, card.dense) for n, k in ((q_width, D), (2 * kv_width, D), (D, q_width))
        )
        shared = 2 * self.multiply(T, S, D, card.dense) + self.multiply(T, D, S, card.dense) if S else 0.0
        experts = 2 * self.multiply(R, F, D, card.grouped, dims.n_experts)
        experts += self.multiply(R, D, F, card.grouped, dims.n_experts)
        attention = 2 * T * self.stage.seq_len * q_width  # causal: half of 4 T L H
        forward, backward = card.attention
        redone, all_redone = again > 0, again == 1  # selective recomputation keeps attention and the experts' products
        elementwise = 17 * BFLOAT16 * T * D + 8 * BFLOAT16 * T * (q_width + kv_width)
        gated = (8 + 3 * redone) * BFLOAT16 * (T * S + R * F)  # silu(gate) x up
        return (
            (3 + again) * (projections + shared)
            + (3 + all_redone) * experts
            + attention / card.peak * (1 / forward + 2.5 / backward + all_redone / forward)
            + 6 * T * dims.n_experts * D / card.float32_peak  # router
            + self.move(elementwise + gated)
            + card.choice * T
            + self.gather_rows(redone)
        )

    def gather_rows(self, redone: bool) -> float:
        """Return the time of moving tokens to the experts' rows and back (`titan_ext.mobilemoe.row_gather`), both ways.

        Each of the four directions is one kernel that reads by index and writes once:

        - tokens to rows: R rows read and written, and again where they are recomputed;
        - its gradient: the K rows of each token read, which leaves out the padding, and T tokens written;
        - the weighted sum of the experts' outputs: the same;
        - its gradient: R outputs and R rows of the tokens' gradients read, for the products with which the weights get
          theirs, and R rows written.

        Indices and weights, of 4 and 8 bytes a row, are left out beside rows of 2 D bytes.
        """
        T, R, chosen = self.tokens, self.rows, self.tokens * self.dims.top_k
        rows = 2 * R * (1 + redone) + 2 * (chosen + T) + 3 * R
        return self.move(BFLOAT16 * self.dims.d_model * rows)

    def time_rest(self) -> float:
        """Return the time of the head, its cross entropy, and FSDP's casts and additions, a micro-batch."""
        dims, T, V = self.dims, self.tokens, self.dims.vocab_size
        total = count_parameters(dims).total
        head = 3 * self.multiply(T, V, dims.d_model, self.card.dense)
        entropy = self.move(12 * T * V)  # bfloat16 logits and gradient, float32 sums
        accumulated = self.move(8 * 12 * V * dims.d_model)  # the head's gradient, an eighth of a sequence at a time
        casts = self.move(2 * 6 * total + 18 * total)  # weights to bfloat16 twice; gradients to float32, added
        quantized = 0.0
        if self.stage.quantize:  # of every weight, forward and again; of the head eight times, uncompiled
            quantized = self.move(12 * (total - V * dims.d_model) + 8 * 28 * FLOAT32 * V * dims.d_model)
        return head + entropy + accumulated + casts + quantized
