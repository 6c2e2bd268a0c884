"""Disk space, checked before a run starts: bytes that the run will write against bytes that are free."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from core.errors import RefusedInput
from core.stages import STAGE_FOLDERS
from pipelines.engine.manifest import Manifest
from pipelines.recipe import Recipe, to_dict
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
        * sum(stage.checkpoints_kept for _, stage in recipe.stages.items()),
        artifacts=int(parameters * (BF16_BYTES * BF16_MODELS + INT4_BYTES * INT4_MODELS)),
    )


def estimate_left(recipe: Recipe, run: Path) -> DiskEstimate:
    """Estimate what is still to be written to a run folder.

    What a finished step has written is neither counted nor looked at: shards are hundreds of thousands of files. A step
    that was recorded with other options of the recipe counts as not finished.
    """
    whole, parameters = estimate_disk(recipe), count_parameters(recipe.model).total
    manifest = Manifest(run)
    tree, recorded = to_dict(recipe), manifest.content.get("recipe", {})

    def is_done(step: str, *keys: str) -> bool:
        return manifest.step(step)["state"] == "done" and all(tree[key] == recorded.get(key) for key in keys)

    data_done = is_done("data", "data", "seed")
    data = 0 if data_done else whole.data - measure_folder(run / "data.partial") - measure_folder(run / "data")
    checkpoints = 0
    for name, stage in recipe.stages.items():
        is_same = tree["stages"][name] == recorded.get("stages", {}).get(name)
        if not (data_done and is_same and is_done(name, "model", "parallel")):
            size = parameters * CHECKPOINT_BYTES_PER_PARAMETER * stage.checkpoints_kept
            checkpoints += max(0, size - measure_folder(run / STAGE_FOLDERS[name] / "checkpoint"))
    artifacts = 0
    if checkpoints or not is_done("export", "export", "quantization"):
        artifacts = whole.artifacts - measure_folder(run / "artifacts") - measure_folder(run / "eval" / "work")
    return DiskEstimate(max(0, data), checkpoints, max(0, artifacts))


def check_disk(recipe: Recipe, run: Path) -> None:
    """Check that what a run still has to write will fit.

    Raises:
        RefusedInput: it will not fit; the message has the estimate, the free space and the way out.
    """
    left, anchor = estimate_left(recipe, run), find_existing_parent(run)
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
