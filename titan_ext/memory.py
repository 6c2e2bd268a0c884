"""This module estimates the memory of one rank at the peak of a training step by a closed formula.

The formula counts the tensors of a step. The bytes that autograd keeps per layer for the backward pass were read on the
CPU, with and without recomputation and compile, and tests/titan_ext/test_memory.py compares them with the formula. On a
GPU that was not measured. The formula does not count the memory of the runtime itself, the loader's cache,
fragmentation, and the attention probabilities that the CPU keeps of documents up to 512 tokens
(titan_ext/mobilemoe/attention.py).

Shape legend, as in the model: D model dimension, F width of an expert, E experts, K experts per token.
"""

from dataclasses import dataclass

from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.model_stats import ParameterCount, count_parameters, split_layers

FLOAT32 = 4
"""Number of bytes of a float32 value."""
BYTES = {"bfloat16": 2, "float32": 4}
"""Number of bytes of a value, by computing dtype."""
INT64 = 8
"""Number of bytes of an index."""
OPTIMIZER_BYTES = 2 * FLOAT32
"""Number of bytes of AdamW's two float32 moments per parameter."""
LOSS_CHUNKS = 8
"""Number of chunks of `titan_ext.training.head_loss`: logits exist for one chunk of a sequence at a time."""
LOGIT_COPIES = 3
"""Number of float32 tensors of a chunk's logits: the logits, their softmax and their gradient."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank by kind. All sizes are in bytes."""

    parameters: int
    """Shard of the float32 master weights."""
    gradients: int
    """Shard of the float32 gradients."""
    optimizer: int
    """Shard of AdamW's moments."""
    gathered: int
    """Gathered weights in the computing dtype: the embedding and two layers, the current and the next. In a pipeline
    all layers of the rank are gathered."""
    reduction: int
    """Unsharded gradients of one layer in the computing dtype and in float32, before they are reduced; in a pipeline
    those of all layers of the rank, in float32. On the CPU a rank that has no other shards needs no float32 copy."""
    activations: int
    """Tensors of one micro-batch's forward pass that are kept for the backward pass. In a pipeline they are counted for
    all micro-batches that are in flight."""
    recomputed: int
    """Tensors of one layer that the backward pass computes again; 0 without recomputation."""
    logits: int
    """Logits of one chunk of the sequence, with softmax and gradient."""
    head: int
    """Float32 sum of the output projection's gradient, which the chunks of the loss add to."""
    head_gradient: int
    """That sum in the computing dtype. It is reduced together with the embedding's gradient, which comes last."""
    combination: int
    """Rows of the routed experts in the backward pass of a layer's weighted sum of experts: their gradient, or, where
    the block is not compiled, three float32 copies: gradient, outputs and the product of both."""
    rounded: int
    """Shard of the weights of quantization-aware training on their grid, in the computing dtype."""
    teacher: int
    """Shard of the teacher's weights in self-distillation, in the computing dtype."""
    accumulates: bool
    """Whether gradients of an earlier micro-batch are in memory together with the activations."""

    @property
    def peak(self) -> int:
        """Return the bytes at the peak.

        In the backward pass activations shrink while gradients grow, layer by layer. So the peak contains the larger of
        the two. It contains both if gradients are accumulated over micro-batches.
        """
        growing = self.gradients + self.reduction
        falling = self.activations + max(
            self.head + self.logits, self.head_gradient + self.recomputed + self.combination
        )
        moving = growing + falling if self.accumulates else max(growing, falling)
        return self.parameters + self.rounded + self.teacher + self.optimizer + self.gathered + moving


def estimate_memory(dims: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> MemoryEstimate:
    """Estimate the memory of one rank that trains `stage` under the layout `parallel`.

    In a pipeline the result is that of the rank that needs the most memory. Recomputation and compile that the layout
    leaves open are those of the CPU: none. `titan_ext.layout.settle_layout` gives those of a GPU.
    """
    ranks = [_estimate_pipeline_rank(rank, dims, stage, parallel) for rank in range(parallel.pipeline_parallel)]
    return max(ranks, key=lambda estimate: estimate.peak)


def _estimate_pipeline_rank(rank: int, dims: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> MemoryEstimate:
    count, size, is_pipeline = count_parameters(dims), BYTES[parallel.precision], parallel.pipeline_parallel > 1
    is_last = rank == parallel.pipeline_parallel - 1
    n_layers = sum(split_layers(dims, parallel.pipeline_stages)[rank :: parallel.pipeline_parallel])
    embedding = count.embedding if rank == 0 or is_last else 0
    held = embedding + (count.total - count.embedding) * n_layers // dims.n_layers
    trained = held - (embedding if is_pipeline and is_last else 0)  # the replica has no optimizer state
    shards = parallel.world_size // (parallel.replicas * parallel.pipeline_parallel)
    shard = -(-held // shards)

    layer = _count_dense_parameters(count, dims) // parallel.tensor_parallel
    layer += count.routed_experts // dims.n_layers // _count_expert_parts(parallel)
    root = embedding // parallel.tensor_parallel
    tokens = stage.local_batch_size * stage.seq_len // (parallel.context_parallel * parallel.tensor_parallel)
    whole = activation_bytes_per_token(dims, size, stage.capacity_factor, compiled=bool(parallel.compile))
    checkpoint = parallel.activation_checkpoint or "none"
    # Compiled, one kernel reads gradients and outputs and writes (titan_ext/mobilemoe/row_gather.py, _SumRows).
    rows_copies = size if parallel.compile else 3 * FLOAT32
    kept = {
        "none": whole,
        "selective": selective_bytes_per_token(dims, size, stage.capacity_factor, parallel.expert_ranks > 1),
        "full": size * dims.d_model,
    }[checkpoint]
    return MemoryEstimate(
        parameters=FLOAT32 * shard,
        gradients=FLOAT32 * shard,
        optimizer=OPTIMIZER_BYTES * -(-trained // shards),
        gathered=size * (root + (n_layers if is_pipeline else 2) * layer),
        reduction=FLOAT32 * (root + n_layers * layer) if is_pipeline else (size + FLOAT32) * max(layer, root),
        activations=int(tokens * kept * n_layers * _count_micro_batches_in_flight(rank, stage, parallel)),
        recomputed=0 if checkpoint == "none" else tokens * whole,
        logits=LOGIT_COPIES * FLOAT32 * tokens * dims.vocab_size // LOSS_CHUNKS if is_last else 0,
        head=FLOAT32 * root if is_last else 0,
        head_gradient=size * root if is_last else 0,
        combination=int(rows_copies * tokens * dims.top_k * (stage.capacity_factor or 1) * dims.d_model),
        rounded=size * shard if stage.quantize else 0,
        teacher=size * shard if stage.quantize and stage.distillation_weight else 0,
        accumulates=stage.global_batch_size > stage.local_batch_size * parallel.data_parallel,
    )


def _count_micro_batches_in_flight(rank: int, stage: StageConfig, parallel: ParallelConfig) -> float:
    """Return the largest number of micro-batches whose activations a rank of a pipeline holds at the same time.

    A micro-batch counts as one if the rank holds its activations in all layers of the rank.
    """
    ranks_after = parallel.pipeline_parallel - 1 - rank
    if parallel.pipeline_schedule == "Interleaved1F1B" and parallel.pipeline_parallel > 1:
        in_flight = (2 * ranks_after + parallel.pipeline_parallel + 1) / 2  # each micro-batch in one of its two stages
    else:
        in_flight = ranks_after + 1
    return min(in_flight, stage.global_batch_size // (stage.local_batch_size * parallel.data_parallel))


def activation_bytes_per_token(
    dims: ModelDims, size: int, capacity_factor: float | None, *, compiled: bool = False
) -> int:
    """Return the bytes that one layer keeps of one token for its backward pass, without recomputation.

    Args:
        size: number of bytes of a value in the computing dtype.
        capacity_factor: room of an expert in drop-and-pad dispatch, in multiples of its balanced share of the tokens.
            The padding is counted too. None for dropless dispatch.
        compiled: whether the block is compiled. The backward pass then computes cheap operations again by itself: it
            keeps the float32 forms of norms no longer, and of gate, silu(gate), up and their product only three.
    """
    D, F, E, K = dims.d_model, dims.expert_hidden, dims.n_experts, dims.top_k
    width = (dims.n_heads + dims.n_kv_heads) * dims.head_dim  # of q and out, and of k and v
    rows = K * (capacity_factor or 1)
    router = FLOAT32 * (D + 2 * E)
    if compiled:
        return int(router + size * (4 * D + 3 * width + 3 * dims.shared_hidden + rows * 3 * (F + D)))
    norms = 2 * (2 * FLOAT32 + size) * D  # float32 input, its normalised form, and what goes on in the computing dtype
    attention = FLOAT32 * width + 2 * size * width  # q, k before; q, k, v, out after
    shared = 4 * size * dims.shared_hidden  # gate, silu(gate), up, their product
    routed = rows * (4 * size * F + 2 * size * D + FLOAT32 * D)  # the same, rows in and out, weighted rows in float32
    return int(norms + attention + router + shared + routed)


def selective_bytes_per_token(dims: ModelDims, size: int, capacity_factor: float | None, exchanged: bool) -> int:
    """Return the bytes that one layer keeps of one token under selective recomputation.

    It keeps the layer's input, the outputs of attention, of every second dense product (q, v, and the shared expert's
    gate and output), of the experts' three products, of the choices of experts and tokens, and of the exchange of rows
    (titan_ext/mobilemoe/recomputation.py).

    Args:
        size: number of bytes of a value in the computing dtype.
        capacity_factor: as in `activation_bytes_per_token`.
        exchanged: whether expert parallelism exchanges the experts' rows.
    """
    q_width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
    rows = dims.top_k * (capacity_factor or 1)
    products = size * (2 * dims.d_model + 2 * q_width + kv_width + dims.shared_hidden)
    experts = size * rows * (2 * dims.expert_hidden + dims.d_model)
    attention = FLOAT32 * dims.n_heads  # logarithm of the sum of each head
    chosen = (FLOAT32 + INT64) * (dims.top_k + (rows if capacity_factor else 0))  # values and indices of top-k
    exchange = 2 * size * rows * dims.d_model if exchanged else 0
    return int(products + experts + attention + chosen + exchange)


def _count_dense_parameters(count: ParameterCount, dims: ModelDims) -> int:
    """Return the number of parameters of one layer without the routed experts."""
    return (count.attention + count.router + count.shared_experts + count.norms) // dims.n_layers


def _count_expert_parts(parallel: ParallelConfig) -> int:
    """Return the number of parts that the routed experts are split into while they compute."""
    return parallel.expert_ranks if parallel.expert_ranks > 1 else parallel.tensor_parallel
