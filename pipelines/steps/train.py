"""The steps `pretrain`, `midtrain`, `sft` and `qat`: one training stage each, on a gang of workers."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from core.stages import STAGE_FOLDERS, STAGES
from pipelines.engine.stop_file import find_stop_file
from pipelines.recipe import Recipe
from pipelines.steps.context import Context
from pipelines.steps.continue_stage import find_start
from pipelines.steps.quick_suite import score_beside
from pipelines.validation.memory_rules import settle
from titan_ext.config import StageConfig
from titan_ext.training.stage_spec import StageSpec, find_final_checkpoint

INITIAL_CHECKPOINT = "stages/0_initial"
"""Folder below the run folder with the weights of `Recipe.initial_model` as a checkpoint."""


def train_stage(context: Context, name: str) -> dict[str, Any]:
    """Train one stage and return the path of its last checkpoint, relative to the run folder.

    The stage works in place instead of in a partial folder: a checkpoint counts only once its metadata is written, and
    an interrupted stage resumes from the last one.
    """
    recipe, run = context.recipe, context.run
    stage = recipe.stages.get(name)
    if name == STAGES[0] and recipe.initial_model and not (run / INITIAL_CHECKPOINT).exists():
        arguments = (Path(recipe.initial_model).absolute(), run / INITIAL_CHECKPOINT)
        context.run_job("import", import_model_on_worker, arguments, cpus=1)
    if stage.steps:
        spec = StageSpec(
            name=name, model=recipe.model, stage=drop_empty_domains(stage), parallel=settle(recipe),
            data=run / "data", out=run / STAGE_FOLDERS[name], initial_checkpoint=input_checkpoint(recipe, run, name),
            seed=recipe.seed, quantization=recipe.quantization, shard_cache=recipe.cluster.shard_cache,
            stop_file=find_stop_file(run), continued_at=find_start(run, name),
            hang_seconds=60 * recipe.cluster.hang_minutes,
        )  # fmt: skip
        with score_beside(context, name):
            context.require_cluster().run_gang(run_stage_on_worker, spec, name=name)
    return {"checkpoint": str(output_checkpoint(recipe, run, name).relative_to(run))}


def import_model_on_worker(folder: Path, out: Path) -> None:
    """Write a folder in the released format as the checkpoint that training starts from."""
    from eval.export.import_hf import import_folder

    import_folder(folder, out)


def run_stage_on_worker(spec: StageSpec) -> None:
    """Run one rank of a training stage, on the number of threads that its environment states.

    Other numbers of threads add in another order. A worker that Ray has used before may have begun with another one.
    """
    import torch

    from titan_ext.training import train

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train.run_stage(spec)


def input_checkpoint(recipe: Recipe, run: Path, name: str) -> Path | None:
    """Return the checkpoint that a stage starts from; None where it starts from random weights."""
    position = STAGES.index(name)
    if position:
        return output_checkpoint(recipe, run, STAGES[position - 1])
    return run / INITIAL_CHECKPOINT if recipe.initial_model else None


def output_checkpoint(recipe: Recipe, run: Path, name: str) -> Path:
    """Return the last checkpoint of a stage; the one it started from if the stage has 0 steps."""
    steps = recipe.stages.get(name).steps
    if steps:
        return find_final_checkpoint(run / STAGE_FOLDERS[name], steps)
    checkpoint = input_checkpoint(recipe, run, name)
    assert checkpoint is not None, f"validate_recipe refuses a {name} stage of 0 steps without an initial model"
    return checkpoint


def drop_empty_domains(stage: StageConfig) -> StageConfig:
    """Return the stage without the domains whose share is 0; they may have no shards."""
    return dataclasses.replace(stage, mixture={domain: share for domain, share in stage.mixture.items() if share})
