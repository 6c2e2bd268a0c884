"""Runs one stage on one rank. The launcher (Ray or titan_ext/training/launch.py) starts it once per rank."""

import logging
import os
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import init_logger, logger

from core.errors import RefusedInput
from core.stages import heldout_folder
from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.trainer import StageTrainer
from titan_ext.training.trainer_config import build_trainer_config


def run_stage(spec: StageSpec) -> None:
    """Train the stage to its last step on this rank; resume from `spec.out`/checkpoint where there is one.

    Raises:
        RuntimeError: loss or gradient norm is not finite; the parameters were not updated with them.
        RefusedInput: see `build_trainer`.
    """
    trainer = build_trainer(spec)
    try:
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()


def build_trainer(spec: StageSpec) -> StageTrainer:
    """Build this rank's trainer of a stage. It has loaded no checkpoint and trained no step.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be in the environment.

    Raises:
        RefusedInput: shards, tokenizer or layout do not fit the stage.
    """
    spec.out.mkdir(parents=True, exist_ok=True)
    _log_to_file(spec.out / "logs" / f"rank_{os.environ['RANK']}.log")
    return build_stage_config(spec).build()


def build_stage_config(spec: StageSpec) -> StageTrainer.Config:
    """Build the trainer's configuration of a stage.

    Raises:
        RefusedInput: the tokenizer has no pad token, or held-out shards are missing.
    """
    shards = spec.stage.shards
    return build_trainer_config(
        model=spec.model,
        stage=spec.stage,
        parallel=spec.parallel,
        shards=str(spec.data / "shards" / shards),
        heldout=str(spec.data / "heldout" / heldout_folder(shards)),
        tokenizer=str(spec.data / "tokenizer"),
        out=str(spec.out),
        seed=spec.seed,
        quantization=spec.quantization,
        flavor=spec.name,
        initial_checkpoint=str(spec.initial_checkpoint.absolute()) if spec.initial_checkpoint else None,
        pad_token_id=_read_pad_token_id(spec.data / "tokenizer"),
    )


def _read_pad_token_id(tokenizer: Path) -> int:
    from transformers import AutoTokenizer

    pad = AutoTokenizer.from_pretrained(tokenizer).pad_token_id
    if pad is None:
        raise RefusedInput(f"{tokenizer}: the tokenizer names no pad token; set pad_token in tokenizer_config.json")
    return pad


def _log_to_file(path: Path) -> None:
    init_logger()
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
