"""What a recipe says about the model and a training stage.

The facts behind the numbers: arXiv 2605.27358 (MobileMoE), tables of architecture and training.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """llama3-type RoPE scaling, as the released config.json states it."""

    factor: float = 16.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0


@dataclass(frozen=True)
class ModelDims:
    """Dimensions of a MobileMoE: every layer is attention plus an MoE of routed and one shared SwiGLU expert."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    expert_hidden: int
    """F: hidden width of one routed expert."""
    shared_hidden: int
    """Hidden width of the shared expert that is always on."""
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
    """Tokens of one packed sequence."""
    global_batch_size: int
    """Sequences an optimizer step, over all ranks."""
    local_batch_size: int
    """Sequences a rank and forward pass, the micro-batch; the rest of the global batch is gradient accumulation."""
    learning_rate: float
    shards: str
    """Folder under the data step's `shards/` (and `heldout/`): pretrain, midtrain or sft."""
    mixture: dict[str, float]
    """Domain -> share of the trained tokens; sums to 1."""
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = 0
    min_lr_factor: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    router_z_loss: float = 1e-4
    expert_bias_update_rate: float = 1e-3
    capacity_factor: float | None = None
    """Drop-and-pad dispatch in training: room of an expert in multiples of its balanced share; None drops nothing."""
    skip_spikes_sigma: float | None = None
    """Skip steps whose loss or gradient norm is this many standard deviations above that of the last steps."""
    log_interval: int = 10
    checkpoint_interval: int = 500
    heldout_interval: int = 500
    """Steps between two measurements of the held-out loss; the last step is always measured."""
    heldout_batches: int = 16
    """Global batches of held-out data a measurement."""
    quantize: bool = False
    """Whether the stage trains with fake-quantized weights and activations, on the grid of `Recipe.quantization`."""
    distillation_weight: float = 0.0
    """w in loss = (1 - w) cross entropy + w KL from the unquantized model the stage starts from; 0 has no teacher.
    Above 0 only where `quantize` is set."""


@dataclass(frozen=True)
class ParallelConfig:
    """The gang of processes a stage runs on.

    `world_size` = pipeline stages' ranks x replicas x shards x context x tensor parallel ranks.
    """

    world_size: int
    expert_parallel: int = 1
    """Ranks that share the routed experts; divides n_experts and the ranks of one replica of a pipeline stage."""
    data_parallel_replicate: int = 1
    """HSDP: copies of the sharded model; 1 is plain FSDP2."""
    tensor_parallel: int = 1
    """Ranks that split every dense matrix and, without expert parallelism, every expert; divides n_kv_heads."""
    context_parallel: int = 1
    """Ranks that split every sequence."""
    pipeline_parallel: int = 1
    """Ranks that split the layers. Micro-batches of `local_batch_size` pass through them, all of a rank's part of the
    global batch in one go: at least one a rank of the pipeline."""
    pipeline_schedule: Literal["1F1B", "Interleaved1F1B"] = "1F1B"
    """Order of forward and backward passes. Interleaved1F1B gives every rank two stages, which halves the time that
    ranks wait at the ends of a step and sends twice as much."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of FSDP's mixed-precision parameters; master weights and reductions are float32."""
    activation_checkpoint: Literal["none", "selective", "full"] | None = None
    """What the backward pass computes again: nothing, what is cheap to, or every block; None takes selective on a GPU
    and none on the CPU."""
    compile: bool | None = None
    """Compile every block; None does on a GPU and does not on the CPU."""
    deterministic: bool = False
    """Only algorithms that give the same bits in every run, as all on the CPU do; a GPU has others that are faster, and
    an operation without such an algorithm ends the stage."""

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.world_size // max(self.tensor_parallel * self.context_parallel * self.pipeline_parallel, 1)

    @property
    def pipeline_stages(self) -> int:
        """Parts that the layers are split into."""
        return self.pipeline_parallel * (2 if self.pipeline_schedule == "Interleaved1F1B" else 1)
