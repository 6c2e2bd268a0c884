"""Memory of one rank at the peak of a training step, by closed formula.

Counted are the tensors of a step without recomputation and without compile, as the CPU runs it: what autograd keeps
for the backward pass, a layer at a time, was read off `torch.autograd.graph.saved_tensors_hooks` and is held against
it by tests/titan_ext/test_memory.py. On a GPU fused norms, compile and selective recomputation keep less, so it should
be an upper bound there; that was not measured. Not counted: the runtime's own floor, the loader's cache, fragmentation,
and the attention probabilities that the CPU keeps of documents up to 512 tokens (titan_ext/mobilemoe/attention.py).

Suffixes as in the model: D model dimension, F width of an expert, E experts, K experts a token.
"""

from dataclasses import dataclass

from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.model_stats import ParameterCount, count_parameters, layers_of_stages

FLOAT32 = 4
BYTES = {"bfloat16": 2, "float32": 4}
OPTIMIZER_BYTES = 2 * FLOAT32
"""AdamW's two moments a parameter."""
LOSS_CHUNKS = 8
"""Of torchtitan's ChunkedLossWrapper: logits exist for one of so many parts of a sequence at a time."""
LOGIT_COPIES = 3
"""A chunk's logits in float32, their softmax and their gradient."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank."""

    parameters: int
    """Its shard of the float32 master weights."""
    gradients: int
    """Its shard of the float32 gradients."""
    optimizer: int
    gathered: int
    """Whole weights in the computing dtype: embedding, and two layers (one at work, one being fetched); in a pipeline
    all the rank has."""
    reduction: int
    """A layer's whole gradients in the computing dtype and in float32, on their way to the shards; in a pipeline those
    of all the rank has, in float32. On the CPU a rank that holds all of them needs no float32 copy."""
    activations: int
    """What the backward pass of one micro-batch needs of the forward pass; in a pipeline of all that are under way."""
    logits: int
    """One chunk of the sequence against the vocabulary."""
    head: int
    """The embedding's whole float32 gradient: reduced after every chunk, kept by FSDP2 until the next reduction."""
    combination: int
    """The routed experts' rows, three times in float32, where the backward pass takes a layer's weighted sum apart."""
    teacher: int
    """Its shard of the float32 weights of the model that self-distillation learns from."""
    accumulates: bool
    """Whether gradients of an earlier micro-batch are there when the activations are."""

    @property
    def peak(self) -> int:
        """Activations shrink as gradients grow, a layer at a time: the larger of the two, or both if accumulating."""
        growing = self.gradients + self.reduction
        falling = self.activations + self.head + max(self.logits, self.combination)
        moving = growing + falling if self.accumulates else max(growing, falling)
        return self.parameters + self.teacher + self.optimizer + self.gathered + moving


def estimate_memory(dims: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> MemoryEstimate:
    """The memory of a rank of `parallel` that trains `stage`; in a pipeline, of the rank that needs the most."""
    ranks = [_of_pipeline_rank(rank, dims, stage, parallel) for rank in range(parallel.pipeline_parallel)]
    return max(ranks, key=lambda estimate: estimate.peak)


def _of_pipeline_rank(rank: int, dims: ModelDims, stage: StageConfig, parallel: ParallelConfig) -> MemoryEstimate:
    count, size, is_pipeline = count_parameters(dims), BYTES[parallel.precision], parallel.pipeline_parallel > 1
    is_last = rank == parallel.pipeline_parallel - 1
    n_layers = sum(layers_of_stages(dims, parallel.pipeline_stages)[rank :: parallel.pipeline_parallel])
    embedding = count.embedding if rank == 0 or is_last else 0
    held = embedding + (count.total - count.embedding) * n_layers // dims.n_layers
    trained = held - (embedding if is_pipeline and is_last else 0)  # the replica has no optimizer state
    shards = parallel.world_size // (parallel.data_parallel_replicate * parallel.pipeline_parallel)
    shard = -(-held // shards)

    layer = _layer_parameters(count, dims) // parallel.tensor_parallel
    layer += count.routed_experts // dims.n_layers // _expert_split(parallel)
    root = embedding // parallel.tensor_parallel
    tokens = stage.local_batch_size * stage.seq_len // (parallel.context_parallel * parallel.tensor_parallel)
    of_token = activation_bytes_per_token(dims, size, stage.capacity_factor)
    return MemoryEstimate(
        parameters=FLOAT32 * shard,
        gradients=FLOAT32 * shard,
        optimizer=OPTIMIZER_BYTES * -(-trained // shards),
        gathered=size * (root + (n_layers if is_pipeline else 2) * layer),
        reduction=FLOAT32 * (root + n_layers * layer) if is_pipeline else (size + FLOAT32) * max(layer, root),
        activations=int(tokens * of_token * n_layers * _micro_batches_under_way(rank, stage, parallel)),
        logits=LOGIT_COPIES * FLOAT32 * tokens * dims.vocab_size // LOSS_CHUNKS if is_last else 0,
        head=0 if is_pipeline else FLOAT32 * root,
        combination=int(3 * FLOAT32 * tokens * dims.top_k * (stage.capacity_factor or 1) * dims.d_model),
        teacher=FLOAT32 * shard if stage.quantize and stage.distillation_weight else 0,
        accumulates=stage.global_batch_size > stage.local_batch_size * parallel.data_parallel,
    )


def _micro_batches_under_way(rank: int, stage: StageConfig, parallel: ParallelConfig) -> float:
    """Micro-batches whose activations of all its layers a pipeline's rank holds at once, at the most."""
    ranks_after = parallel.pipeline_parallel - 1 - rank
    if parallel.pipeline_schedule == "Interleaved1F1B" and parallel.pipeline_parallel > 1:
        under_way = (2 * ranks_after + parallel.pipeline_parallel + 1) / 2  # of each of its two stages
    else:
        under_way = ranks_after + 1
    return min(under_way, stage.global_batch_size // (stage.local_batch_size * parallel.data_parallel))


def activation_bytes_per_token(dims: ModelDims, size: int, capacity_factor: float | None) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    Args:
        size: bytes of a value in the computing dtype.
        capacity_factor: of drop-and-pad, whose padding counts; None where nothing is dropped or padded.
    """
    D, F, E, K = dims.d_model, dims.expert_hidden, dims.n_experts, dims.top_k
    q_width, kv_width = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim
    rows = K * (capacity_factor or 1)
    norms = 2 * (2 * FLOAT32 + size) * D  # float32 input, its normalised form, and what goes on in the computing dtype
    attention = FLOAT32 * (q_width + kv_width) + 2 * size * (q_width + kv_width)  # q, k before; q, k, v, out after
    router = FLOAT32 * (D + 2 * E)
    shared = 4 * size * dims.shared_hidden  # gate, silu(gate), up, their product
    routed = rows * (4 * size * F + 2 * size * D + FLOAT32 * D)  # the same, rows in and out, weighted rows in float32
    return int(norms + attention + router + shared + routed)


def _layer_parameters(count: ParameterCount, dims: ModelDims) -> int:
    """Of one layer, all but the routed experts."""
    return (count.attention + count.router + count.shared_experts + count.norms) // dims.n_layers


def _expert_split(parallel: ParallelConfig) -> int:
    """Into how many parts the routed experts stay split while they compute."""
    return parallel.expert_parallel if parallel.expert_parallel > 1 else parallel.tensor_parallel
