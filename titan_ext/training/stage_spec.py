"""One stage of one run, as the driver hands it to its workers. Imports no torch: the scheduler reads it at once."""

from dataclasses import dataclass, field
from pathlib import Path

from core.errors import RefusedInput
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class StageRun:
    """What to train, on what, from where and into which folder."""

    name: str
    model: ModelDims
    stage: StageConfig
    parallel: ParallelConfig
    data: Path
    """Finished data step: tokenizer/, shards/, heldout/."""
    out: Path
    initial_checkpoint: Path | None
    """DCP step folder that the stage starts from; None for pre-training."""
    seed: int
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """INT4 grid of a stage with `quantize`."""


def final_checkpoint(out: Path, steps: int) -> Path:
    """The DCP folder a finished stage left.

    Raises:
        RefusedInput: there is none; the stage is not finished.
    """
    folder = Path(out) / "checkpoint" / f"step-{steps}"
    if not (folder / ".metadata").exists():
        raise RefusedInput(f"{folder}: no finished checkpoint; run the stage to its last step first")
    return folder
