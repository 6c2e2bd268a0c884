"""Configuration of the model, of a training stage and of its layout, as a recipe states it.

The numbers are from arXiv 2605.27358 (MobileMoE), tables of architecture and training.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

Recomputation = Literal["none", "selective", "full"]
"""What a layer's backward pass computes again, from the most memory to the least, which is the slowest."""


@dataclass(frozen=True)
class RopeScaling:
    """llama3-type RoPE scaling, as the released config.json states it."""

    factor: float = 16.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a MobileMoE: every layer is attention plus an MoE of routed and one shared SwiGLU expert.

    The published models have a shared expert, and so has the released checkpoint format. Only a sweep of the scaling
    law trains models without one; one expert of which every token takes it is a dense model.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    expert_hidden: int
    """Hidden width of one routed expert, F in tensor names."""
    shared_hidden: int
    """Hidden width of the shared expert, which every token passes through; 0 for none."""
    n_experts: int
    top_k: int
    vocab_size: int = 128_256
    max_seq_len: int = 8192
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    route_scale: float = 2.5


FLAVORS: dict[str, ModelDims] = {
    "tiny": ModelDims(
        d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32,
        expert_hidden=64, shared_hidden=256, n_experts=16, top_k=4, vocab_size=4096, max_seq_len=1024,
    ),
    "S": ModelDims(
        d_model=768, n_layers=20, n_heads=12, n_kv_heads=4, head_dim=64,
        expert_hidden=384, shared_hidden=1536, n_experts=60, top_k=4,
    ),
    "M": ModelDims(
        d_model=1024, n_layers=26, n_heads=16, n_kv_heads=4, head_dim=64,
        expert_hidden=512, shared_hidden=2048, n_experts=60, top_k=4,
    ),
    "L": ModelDims(
        d_model=1280, n_layers=32, n_heads=20, n_kv_heads=4, head_dim=64,
        expert_hidden=640, shared_hidden=2560, n_experts=60, top_k=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StageConfig:
    """One of the four training stages, run by torchtitan's Trainer."""

    steps: int
    seq_len: int
    """Number of tokens of one packed sequence."""
    global_batch_size: int
    """Number of sequences of an optimizer step, over all ranks."""
    local_batch_size: int
    """Number of sequences of a micro-batch: one forward pass of one rank. Gradients are accumulated over the
    micro-batches of a step."""
    learning_rate: float
    shards: str
    """Folder below the data step's `shards/`: pretrain, midtrain or sft (core.stages.SHARD_FOLDERS)."""
    mixture: dict[str, float]
    """Domain -> share of the trained tokens; sums to 1."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the learning rate's decay after the warm-up."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 1.0
    """Share of the steps, at the end of the stage, over which the learning rate falls. Below 1 it first stays at its
    height after the warm-up (warmup-stable-decay, arXiv 2404.06395); 1 decays from the warm-up on."""
    min_lr_factor: float = 0.1
    """Learning rate of the last step as a share of `learning_rate`."""
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    router_z_loss: float = 1e-4
    """Weight of the router z-loss."""
    expert_bias_update_rate: float = 1e-3
    """Change of the expert bias in one update (loss-free load balancing, arXiv 2408.15664)."""
    capacity_factor: float | None = None
    """Capacity of an expert in training as a multiple of its balanced share (drop-and-pad dispatch). None drops no
    token."""
    skip_spikes_sigma: float | None = None
    """Number of standard deviations above the last steps' mean from which on a loss or gradient norm is a spike. The
    update of a spike is skipped. None skips no spike."""
    log_interval: int = 10
    checkpoint_interval: int = 500
    """Number of steps between two checkpoints; 0 counts no steps. After the last step there is always one."""
    checkpoint_minutes: float = 0.0
    """Minutes between two checkpoints, beside those of `checkpoint_interval`; 0 counts no time."""
    checkpoint_permanent_tokens: float = 0.0
    """Trained tokens between two checkpoints that are never deleted; 0 keeps none for good."""
    checkpoints_kept: int = 2
    """Number of the newest checkpoints that are kept, beside the permanent ones. The newest may still be being written,
    so at least 2."""
    heldout_interval: int = 500
    """Number of steps between two measurements of the held-out loss. It is also measured after the last step."""
    heldout_batches: int = 16
    """Number of global batches of held-out data in one measurement."""
    benchmark_interval: int = 0
    """Number of steps between two scores of `evaluation.quick_benchmarks`, measured beside the training from its
    checkpoints, so a multiple of `checkpoint_interval`; 0 measures none."""
    quantize: bool = False
    """Whether the stage trains with fake-quantized weights and activations, on the grid of `Recipe.quantization`."""
    float8: bool = False
    """Whether the products of the blocks, but the router's, are computed in float8 with a scale for each row (torchao).
    Weights, gradients and the output projection stay as they are. On the CPU it is emulated, which takes longer."""
    distillation_weight: float = 0.0
    """Weight w in loss = (1 - w) cross entropy + w KL(teacher || student). The teacher is the unquantized model that
    the stage starts from. 0 trains without a teacher; above 0 needs `quantize`."""

    @property
    def tokens(self) -> int:
        """Return the number of tokens that the stage trains on, prompts and padding included."""
        return self.steps * self.seq_len * self.global_batch_size

    @property
    def permanent_interval(self) -> int:
        """Return the number of steps between two permanent checkpoints; 0 for none."""
        return math.ceil(self.checkpoint_permanent_tokens / (self.global_batch_size * self.seq_len))


@dataclass(frozen=True)
class ShardCacheConfig:
    """The cache in which the ranks of a node keep the shards that they have unpacked. It changes no batch."""

    folder: str = ""
    """Absolute path of a folder on each node's own disk; every node makes it. Empty: `mobilemoe-shards-UID` below the
    node's temporary directory."""
    size_bytes: int = 64 << 30
    """Largest size of the unpacked shards, in bytes, over all runs that share the folder."""


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism of a stage, and how a rank computes.

    `world_size` = pipeline ranks x replicas x shards x context parallel ranks x tensor parallel ranks.
    """

    world_size: int
    expert_parallel: int | None = 1
    """Number of ranks that share the routed experts. It divides n_experts and the ranks of a replica of a stage. None
    selects the one with which a GPU trains the most tokens by the roofline (titan_ext/layout.py), and 1 on the CPU."""
    data_parallel_replicate: int | None = 1
    """Number of copies of the sharded model (HSDP); 1 is plain FSDP2. None selects as above: 1, or one a node."""
    tensor_parallel: int = 1
    """Number of ranks that split every dense matrix and, without expert parallelism, every expert. It divides
    n_kv_heads."""
    context_parallel: int = 1
    """Number of ranks that split every sequence."""
    pipeline_parallel: int = 1
    """Number of ranks that split the layers. All micro-batches of a step pass through the pipeline in one schedule, so
    a step needs at least as many micro-batches as the pipeline has ranks."""
    pipeline_schedule: Literal["1F1B", "Interleaved1F1B"] = "1F1B"
    """Order of forward and backward passes. Interleaved1F1B gives every rank two stages: ranks wait half as long at the
    ends of a step and send twice as much."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype that FSDP2 casts parameters to for computing. Master weights and reductions are float32."""
    activation_checkpoint: Recomputation | None = None
    """Activations that the backward pass computes again: none, those that are cheap to compute, or all of a block. None
    selects the fewest with which the stages fit a GPU's memory, and `none` on the CPU (titan_ext/layout.py)."""
    compile: bool | None = None
    """Whether to compile every block. None compiles on a GPU and not on the CPU."""
    deterministic: bool = False
    """Whether to use only algorithms that give the same bits in every run. On the CPU all do with one thread a rank;
    with several, products in float32 may differ from run to run. A GPU has faster ones that do not, and there an
    operation without a deterministic algorithm ends the stage."""

    @property
    def expert_ranks(self) -> int:
        """Return the number of ranks that share the routed experts. `titan_ext.layout.settle_layout` chooses it."""
        assert self.expert_parallel is not None, "settle_layout has not chosen yet"
        return self.expert_parallel

    @property
    def replicas(self) -> int:
        """Return the number of copies of the sharded model. `titan_ext.layout.settle_layout` chooses it."""
        assert self.data_parallel_replicate is not None, "settle_layout has not chosen yet"
        return self.data_parallel_replicate

    @property
    def data_parallel(self) -> int:
        """Return the number of ranks that read different sequences."""
        return self.world_size // max(self.tensor_parallel * self.context_parallel * self.pipeline_parallel, 1)

    def count_data_ranks(self, ranks: int) -> int:
        """Return how many of `ranks` neighbouring ranks, those of a node, read different sequences, at most."""
        return min(max(ranks // max(self.tensor_parallel * self.context_parallel, 1), 1), max(self.data_parallel, 1))

    @property
    def pipeline_stages(self) -> int:
        """Return the number of parts that the layers are split into."""
        return self.pipeline_parallel * (2 if self.pipeline_schedule == "Interleaved1F1B" else 1)
