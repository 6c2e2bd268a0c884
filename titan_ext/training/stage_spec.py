"""Describes one stage of one run; the driver sends the description to its workers.

It imports no torch: Ray's scheduler unpickles it in processes that must start fast.
"""

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import RefusedInput
from titan_ext.config import ModelDims, ParallelConfig, ShardCacheConfig, StageConfig
from titan_ext.quantization.config import QuantizationConfig


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


def list_finished_checkpoints(out: Path) -> list[int]:
    """Return the steps of the finished checkpoints in a stage's folder, the first one first."""
    found = (path.parent.name for path in (Path(out) / "checkpoint").glob("step-*/.metadata"))
    return sorted(int(name.removeprefix("step-")) for name in found if name.removeprefix("step-").isdecimal())


def find_final_checkpoint(out: Path, steps: int) -> Path:
    """Return the DCP folder that a finished stage of `steps` steps wrote in its folder `out`.

    Raises:
        RefusedInput: there is none; the stage is not finished.
    """
    folder = Path(out) / "checkpoint" / f"step-{steps}"
    if not (folder / ".metadata").exists():
        raise RefusedInput(f"{folder}: no finished checkpoint; run the stage to its last step first")
    return folder
