"""Describes one stage of one run; the driver sends the description to its workers.

It imports no torch: Ray's scheduler unpickles it in processes that must start fast.
"""

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import RefusedInput
from titan_ext.config import ModelDims, ParallelConfig, ShardCacheConfig, StageConfig
from titan_ext.quantization.config import QuantizationConfig

METADATA = ".metadata"
"""File of a DCP checkpoint that is written last: without it there is no checkpoint."""


@dataclass(frozen=True)
class StageSpec:
    """Model, schedule, layout, data and folders of one stage."""

    name: str
    """Name of the stage; torchtitan's logs show it as the flavor."""
    model: ModelDims
    stage: StageConfig
    parallel: ParallelConfig
    data: Path
    """Folder of the finished data step: tokenizer/, shards/, heldout/."""
    out: Path
    """Folder of the stage: checkpoints, metrics and logs are written there."""
    initial_checkpoint: Path | None
    """DCP step folder that the stage starts from; None starts from random weights."""
    seed: int
    """Seed of initial weights and order of documents."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """INT4 grid of a stage with `quantize`."""
    shard_cache: ShardCacheConfig = field(default_factory=ShardCacheConfig)
    """Where each node keeps unpacked shards."""
    stop_file: Path | None = None
    """File whose appearance asks the stage to write a checkpoint and to end early; None looks for none."""
    hang_seconds: float = 0.0
    """Time without a new step after which a rank ends by itself; 0 waits for ever."""
    continued_at: int | None = None
    """Step from which the stage was continued with other options, perhaps with other data; None where it never was."""


def list_finished_checkpoints(out: Path) -> list[int]:
    """Return the steps of the finished checkpoints in a stage's folder, the first one first."""
    found = (path.parent.name for path in (Path(out) / "checkpoint").glob(f"step-*/{METADATA}"))
    return sorted(int(name.removeprefix("step-")) for name in found if name.removeprefix("step-").isdecimal())


def find_final_checkpoint(out: Path, steps: int) -> Path:
    """Return the DCP folder that a finished stage of `steps` steps wrote in its folder `out`.

    Raises:
        RefusedInput: there is none; the stage is not finished.
    """
    folder = Path(out) / "checkpoint" / f"step-{steps}"
    if not (folder / METADATA).exists():
        raise RefusedInput(f"{folder}: no finished checkpoint; run the stage to its last step first")
    return folder
