"""Disk space, checked before a run starts: bytes that the run will write against bytes that are free."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import RefusedInput
from core.stages import STAGE_FOLDERS
from pipelines.recipe import Recipe
from titan_ext.config import StageConfig
from titan_ext.model_stats import count_parameters

CHECKPOINT_BYTES_PER_PARAMETER = 16
"""Bytes: float32 master weights and AdamW's two moments take 12; the rest is room for other files of a checkpoint."""
BF16_BYTES = 2
INT4_BYTES = 0.5 + 2 / 32
"""Half a byte, and a float16 scale for each group of 32."""
BF16_MODELS, INT4_MODELS = 4, 1
"""Exported models: pretrain, midtrain, sft, and sft rounded to INT4 values are BF16; the QAT model is packed."""


@dataclass(frozen=True)
class DiskEstimate:
    """The number of bytes that a run writes, by kind."""

    data: int
    checkpoints: int
    artifacts: int

    @property
    def total(self) -> int:
        """Return the number of bytes that the run writes in all."""
        return self.data + self.checkpoints + self.artifacts


def estimate_disk(recipe: Recipe) -> DiskEstimate:
    """Estimate the size of the run folder: shards, the checkpoints of all stages, the exported models."""
    from data import validate_config

    parameters = count_parameters(recipe.model).total
    return DiskEstimate(
        data=validate_config.estimate_bytes(recipe.data),
        checkpoints=parameters
        * CHECKPOINT_BYTES_PER_PARAMETER
        * sum(count_checkpoints(stage) for _, stage in recipe.stages.items()),
        artifacts=int(parameters * (BF16_BYTES * BF16_MODELS + INT4_BYTES * INT4_MODELS)),
    )


def count_checkpoints(stage: StageConfig) -> int:
    """Return the number of checkpoints that a stage holds at its end: the latest, and those that it keeps for good."""
    permanent = stage.steps // stage.permanent_interval if stage.permanent_interval else 0
    return stage.checkpoints_kept + permanent


def estimate_left(recipe: Recipe, run: Path, actions: Mapping[str, str]) -> DiskEstimate:
    """Estimate what is still to be written to a run folder.

    What an up-to-date step has written is neither counted nor looked at: shards are hundreds of thousands of files. A
    step that is resumed writes what is not there yet. One that is done anew writes all, beside what it puts aside.

    Args:
        actions: step -> what will happen to it (`pipelines.engine.step.plan_actions`); one that is absent is run.
    """
    whole, parameters = estimate_disk(recipe), count_parameters(recipe.model).total

    def count_left(step: str, size: int, *folders: str) -> int:
        action = actions.get(step)
        if action == "skip":
            return 0
        written = sum(measure_folder(run / folder) for folder in folders) if action == "resume" else 0
        return max(0, size - written)

    return DiskEstimate(
        data=count_left("data", whole.data, "data.partial"),
        checkpoints=sum(
            count_left(
                name,
                parameters * CHECKPOINT_BYTES_PER_PARAMETER * count_checkpoints(stage),
                f"{STAGE_FOLDERS[name]}/checkpoint",
            )
            for name, stage in recipe.stages.items()
        ),
        artifacts=count_left("export", whole.artifacts, "artifacts", "eval/work"),
    )


def check_disk(recipe: Recipe, run: Path, actions: Mapping[str, str]) -> None:
    """Check that what a run still has to write will fit. Arguments are those of `estimate_left`.

    Raises:
        RefusedInput: it will not fit; the message has the estimate, the free space and the way out.
    """
    left, anchor = estimate_left(recipe, run, actions), find_existing_parent(run)
    free = shutil.disk_usage(anchor).free
    if left.total > free:
        raise RefusedInput(
            f"--out {run}: the run still needs about {_format_gb(left.total)} (data {_format_gb(left.data)}, "
            f"checkpoints {_format_gb(left.checkpoints)}, artifacts {_format_gb(left.artifacts)}), and the file system "
            f"of {anchor} has {_format_gb(free)} free; give --out on a larger one, or free some space"
        )


def find_existing_parent(path: Path) -> Path:
    """Return the path itself or its nearest ancestor that exists."""
    while not path.exists():
        path = path.parent
    return path


def measure_folder(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 where there is none."""
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(folder) for name in names)


def _format_gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
