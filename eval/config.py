"""What a recipe says about evaluation and export."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EvaluationConfig:
    """Benchmarks through lm-eval and held-out loss."""

    suite: str = "foundational"
    """Name in `eval.benchmarks.suites.SUITES`: the 14 benchmarks of the paper's main table."""
    limit: int | None = None
    """Items a task; None takes all of them."""
    allow_missing_items: bool = False
    """Go on without the benchmarks whose items no registry gives, instead of refusing; the report names them."""
    batch_size: int = 16
    heldout_tokens: int = 200_000
    """Held-out tokens scored a domain at most."""


@dataclass(frozen=True)
class ExportConfig:
    """Layout of the INT4 artifact (`mobilemoe-int4-g32`)."""

    group_size: int = 32
    expert_group_axis: str = "in"
    """`in`: along the input dimension, what the device's fused op needs; `out`: the released checkpoints' layout."""
    expert_group_size: int | None = None
    """Weights that share a scale in the routed experts; None takes `group_size`."""
    max_shard_bytes: int = 4 << 30
    """Size limit of one safetensors file."""


@dataclass(frozen=True)
class DeviceConfig:
    """The ExecuTorch program of a checkpoint."""

    context: int = 2048
    """Positions of the KV cache, which the program holds from its start: prompt and answer together."""
    expert_op: Literal["stock", "fast"] = "stock"
    """`stock`: llama::quantized_moe_ffn, which ExecuTorch's runners have; `fast`: our own, of eval/device_op."""
    expert_group_size: int | None = None
    """Values along the input dimension that share a scale in the experts; None takes the checkpoint's (32)."""
