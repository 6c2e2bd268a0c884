"""Runs one stage on one rank; the launcher (Ray, torchrun) starts it once a rank with the usual environment."""

import logging
import os
from pathlib import Path

from core.errors import RefusedInput
from titan_ext.cpu import adaptations

adaptations.apply()

import torch.distributed as dist  # noqa: E402
from torchtitan.tools.logging import init_logger, logger  # noqa: E402

from titan_ext.training.stage_spec import StageRun  # noqa: E402
from titan_ext.training.trainer import StageTrainer  # noqa: E402
from titan_ext.training.trainer_config import trainer_config  # noqa: E402


def run_stage(run: StageRun) -> None:
    """Train the stage to its last step on this rank; resumes from `run.out`/checkpoint where there is one.

    Raises:
        RuntimeError: loss or gradient are not finite; the parameters were not updated with them.
        And what `build_trainer` raises.
    """
    trainer = build_trainer(run)
    try:
        trainer.train()
    finally:
        trainer.close()
    dist.destroy_process_group()


def build_trainer(run: StageRun) -> StageTrainer:
    """This rank's trainer of a stage, nothing loaded and no step taken yet.

    Needs RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment.

    Raises:
        RefusedInput: shards, tokenizer or layout do not fit the stage.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    _log_to_file(run.out / "logs" / f"rank_{os.environ['RANK']}.log")
    return stage_config(run).build()


def stage_config(run: StageRun) -> StageTrainer.Config:
    """The trainer's configuration of a stage; ValueError where tokenizer or held-out shards are missing."""
    heldout = run.data / "heldout" / ("sft" if run.stage.shards == "sft" else "pretrain")
    return trainer_config(
        model=run.model,
        stage=run.stage,
        parallel=run.parallel,
        shards=str(run.data / "shards" / run.stage.shards),
        heldout=str(heldout),
        tokenizer=str(run.data / "tokenizer"),
        out=str(run.out),
        seed=run.seed,
        quantization=run.quantization,
        flavor=run.name,
        initial_checkpoint=str(run.initial_checkpoint.absolute()) if run.initial_checkpoint else None,
        pad_token_id=_pad_token_id(run.data / "tokenizer"),
    )


def _pad_token_id(tokenizer: Path) -> int:
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
