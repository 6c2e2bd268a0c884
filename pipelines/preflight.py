"""Disk space, checked before a run starts: what the run will write against what the file system has."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from core.errors import RefusedInput
from pipelines.recipe import Recipe
from titan_ext.model_stats import count_parameters

CHECKPOINT_BYTES_PER_PARAMETER = 16
"""float32 master weights and AdamW's two moments are 12; the rest is room for what lies beside them."""
CHECKPOINTS_KEPT = 2
"""torchtitan writes a new checkpoint before it deletes the one before."""
BF16_BYTES = 2
INT4_BYTES = 0.5 + 2 / 32
"""Half a byte and a float16 scale per group of 32."""


@dataclass(frozen=True)
class DiskEstimate:
    """Bytes a run writes, by kind."""

    data: int
    checkpoints: int
    artifacts: int

    @property
    def total(self) -> int:
        """Bytes of the whole run."""
        return self.data + self.checkpoints + self.artifacts


def estimate_disk(recipe: Recipe) -> DiskEstimate:
    """What the run folder will hold: shards, the checkpoints of four stages, the exported models."""
    from data import validate_config

    parameters = count_parameters(recipe.model).total
    stages = len(recipe.stages.items())
    bf16_models, int4_models = 4, 1  # pretrain, midtrain, sft and sft rounded to INT4 values; the QAT model packed
    return DiskEstimate(
        data=validate_config.estimate_bytes(recipe.data),
        checkpoints=parameters * CHECKPOINT_BYTES_PER_PARAMETER * CHECKPOINTS_KEPT * stages,
        artifacts=int(parameters * (BF16_BYTES * bf16_models + INT4_BYTES * int4_models)),
    )


def check_disk(recipe: Recipe, run: Path) -> None:
    """Refuse a run whose files will not fit; what the run folder already holds counts as written.

    Raises:
        RefusedInput: with the estimate, the free space and what to do.
    """
    estimate = estimate_disk(recipe)
    anchor = existing_parent(run)
    free, written = shutil.disk_usage(anchor).free, folder_bytes(run)
    if estimate.total - written > free:
        raise RefusedInput(
            f"--out {run}: the run needs about {_gb(estimate.total)} (data {_gb(estimate.data)}, checkpoints "
            f"{_gb(estimate.checkpoints)}, artifacts {_gb(estimate.artifacts)}), {_gb(written)} of it are there, and "
            f"the file system of {anchor} has {_gb(free)} free; give --out on a larger one, or free some space"
        )


def existing_parent(path: Path) -> Path:
    """The path itself or its nearest ancestor that exists."""
    while not path.exists():
        path = path.parent
    return path


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(folder) for name in names)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
