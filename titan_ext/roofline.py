"""This module computes the tokens a second of one GPU by a roofline: a kernel takes as long as its FLOPs or its bytes.

It is arithmetic, and was never compared with a run. Cards and network are those of `titan_ext.cards`; the shares of
their speeds that kernels reach are assumed. It leaves out the host, and ranks that wait for each other, so a real step
takes longer. Kernels are those of compiled blocks.

Letters: T tokens of a micro-batch, K experts a token, R rows of the routed experts, D model dimension.
"""

import math
from dataclasses import dataclass

from titan_ext.cards import Card, Machine
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.memory import LOSS_CHUNKS
from titan_ext.model_stats import count_parameters
from titan_ext.traffic import TrafficTime, time_traffic

BFLOAT16, FLOAT32 = 2, 4
ROUNDED_WEIGHT = FLOAT32 + BFLOAT16
"""Bytes that QAT's rounding reads and writes of a weight: one kernel, once a step, on the shard."""


FORWARD = 1 / 3
"""Share of a micro-batch's computation that is its forward pass."""


@dataclass(frozen=True)
class StepTime:
    """Time of a training step on one rank, in seconds."""

    micro_batches: float
    """Number of micro-batches of a step."""
    computing: float
    """Kernels of a micro-batch."""
    traffic: TrafficTime
    """What travels in a micro-batch."""
    updating: float
    """The optimizer's update and QAT's rounding of weights, once a step."""

    @property
    def waiting(self) -> float:
        """Return the time that a micro-batch waits for the network: for tokens, and for weights that are late.

        FSDP2 gathers weights and reduces gradients beside the kernels of other layers.
        """
        forward = max(0.0, self.traffic.forward - FORWARD * self.computing)
        backward = max(0.0, self.traffic.backward - (1 - FORWARD) * self.computing)
        return forward + backward + self.traffic.tokens

    @property
    def total(self) -> float:
        """Return the time of the step."""
        return self.micro_batches * (self.computing + self.waiting) + self.updating


def estimate_tokens_per_second(
    dims: ModelDims, stage: StageConfig, parallel: ParallelConfig, machine: Machine | None = None
) -> float | None:
    """Return the tokens a second of one rank; None for layouts that split a sequence or the layers.

    Args:
        parallel: settled layout (`titan_ext.layout.settle_layout`).
    """
    if splits_a_sequence(parallel) or not parallel.compile or parallel.precision != "bfloat16":
        return None
    step = estimate_step(dims, stage, parallel, machine or Machine())
    return stage.local_batch_size * stage.seq_len * step.micro_batches / step.total


def splits_a_sequence(parallel: ParallelConfig) -> bool:
    """Return whether ranks share a sequence or the layers, which the roofline does not know."""
    return parallel.tensor_parallel * parallel.context_parallel * parallel.pipeline_parallel > 1


def estimate_step(dims: ModelDims, stage: StageConfig, parallel: ParallelConfig, machine: Machine) -> StepTime:
    """Return the time of a step under a settled layout that splits no sequence, with compiled blocks."""
    kernels = Kernels(dims, stage, parallel, machine.card)
    shard = count_parameters(dims).total / (parallel.world_size // parallel.replicas)
    moved = 10 * FLOAT32  # AdamW reads and writes 7 values, norm and clipping 3
    return StepTime(
        micro_batches=stage.global_batch_size / (stage.local_batch_size * parallel.data_parallel),
        computing=dims.n_layers * kernels.time_layer() + kernels.time_head() + kernels.move(kernels.count_fsdp_bytes()),
        traffic=time_traffic(dims, stage, parallel, machine),
        updating=kernels.move(shard * (moved + (ROUNDED_WEIGHT if stage.quantize else 0))),
    )


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

    def train_product(self, m: int, n: int, k: int, efficiency: float, *, passes: float, groups: int = 1) -> float:
        """Return the time of a block's product in `passes` passes: forward, two backward, and what is computed again.

        In float8 each operand of a pass is rounded before: read and written where its vectors are rows, read twice
        where they are columns, as those of the weights' gradient are.
        """
        if not self.stage.float8:
            return passes * self.multiply(m, n, k, efficiency, groups)
        assert self.card.float8_peak is not None, "the recipe's rules refuse this card"
        flops, moved = 2 * m * n * k, m * k + groups * n * k + BFLOAT16 * m * n
        product = max(flops / (self.card.float8_peak * efficiency), moved / self.card.bandwidth)
        row, column, weights = BFLOAT16 + 1, 2 * BFLOAT16 + 1, groups * n * k
        rounded = (passes - 2) * row * (m * k + weights) + row * (m * n + weights) + column * (m * n + m * k)
        return passes * product + self.move(rounded)

    def move(self, size: float) -> float:
        """Return the time that reading and writing `size` bytes takes."""
        return size / self.card.bandwidth

    def time_layer(self) -> float:
        """Return the time of one layer's forward and backward pass, recomputation included."""
        dims, card, T, R = self.dims, self.card, self.tokens, self.rows
        D, F, S = dims.d_model, dims.expert_hidden, dims.shared_hidden
        q_width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
        again = {"none": 0.0, "selective": 0.5, "full": 1.0}[self.parallel.activation_checkpoint or "none"]
        redone, all_redone = again > 0, again == 1  # selective recomputation keeps attention and the experts' products
        dense = [(q_width, D), (2 * kv_width, D), (D, q_width), *([(S, D), (S, D), (D, S)] if S else [])]
        products = sum(self.train_product(T, n, k, card.dense, passes=3 + again) for n, k in dense)
        groups = dims.n_experts // self.parallel.expert_ranks  # this rank's experts have rows of all ranks that share
        products += sum(
            self.train_product(R, n, k, card.grouped, passes=3 + all_redone, groups=groups)
            for n, k in ((F, D), (F, D), (D, F))
        )
        attention = 2 * T * self.stage.seq_len * q_width  # causal: half of 4 T L H
        forward, backward = card.attention
        elementwise = 17 * BFLOAT16 * T * D + 8 * BFLOAT16 * T * (q_width + kv_width)
        gated = (8 + 3 * redone) * BFLOAT16 * (T * S + R * F)  # silu(gate) x up
        return (
            products
            + attention / card.peak * (1 / forward + 2.5 / backward + all_redone / forward)
            + 6 * T * dims.n_experts * D / card.float32_peak  # router
            + self.move(elementwise + gated)
            + card.choice * T
            + self.gather_rows(redone)
            + self.round_inputs()
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

    def round_inputs(self) -> float:
        """Return the time that QAT's rounding of activations adds to a layer, both ways.

        Most of it is done by kernels that compute the values: norms, and silu(gate) x up. Attention's output is read
        and written once more, and the second norm writes its output twice, since the router takes it as it is. Where a
        layer is recomputed, this is done again.
        """
        if not self.stage.quantize:
            return 0.0
        again = self.parallel.activation_checkpoint != "none"
        values = 2 * self.dims.n_heads * self.dims.head_dim + self.dims.d_model
        return self.move((1 + again) * BFLOAT16 * self.tokens * values)

    def time_head(self) -> float:
        """Return the time of the output projection and its cross entropy, both ways, an eighth of a sequence at a time.

        The products of the projection's gradient add to a float32 sum (`titan_ext.training.head_loss`). It is cast
        once, and the embedding's gradient, which is filled with zeros first, is added to it.
        """
        dims, V, card = self.dims, self.dims.vocab_size, self.card
        chunk = self.tokens // LOSS_CHUNKS
        products = 2 * self.multiply(chunk, V, dims.d_model, card.dense)
        flops = 2 * chunk * V * dims.d_model
        moved = BFLOAT16 * chunk * (V + dims.d_model) + 2 * FLOAT32 * V * dims.d_model
        products += max(flops / (card.peak * card.dense), moved / card.bandwidth)
        entropy = self.move(12 * self.tokens * V)  # bfloat16 logits and gradient, float32 sums
        gradient = (FLOAT32 + BFLOAT16) + BFLOAT16 + 3 * BFLOAT16  # cast, zeros, addition
        rounded = 2 * BFLOAT16 * self.tokens * dims.d_model if self.stage.quantize else 0
        return LOSS_CHUNKS * products + entropy + self.move(gradient * V * dims.d_model + rounded)

    def count_fsdp_bytes(self) -> float:
        """Return the bytes of FSDP2's casts, copies and additions of a micro-batch.

        Weights are gathered twice. The shard is cast into the collective's input, and what arrives is copied to where
        the weights are; QAT's shard has the computing dtype already, and of one rank it is copied there at once.
        Gradients are cast to float32 and added to those of earlier micro-batches.
        """
        shards, count = self.parallel.world_size // self.parallel.replicas, count_parameters(self.dims)
        here = count.total - count.routed_experts * (1 - 1 / self.parallel.expert_ranks)  # gathered on this rank
        sent = FLOAT32 + BFLOAT16
        if self.stage.quantize:
            sent = 2 * BFLOAT16 if shards > 1 else 0
        reduced = BFLOAT16 + FLOAT32 + 3 * FLOAT32
        return 2 * sent / shards * count.total + (2 * 2 * BFLOAT16 + reduced) * here
