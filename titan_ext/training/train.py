"""Runs one stage on one rank. The launcher (Ray or titan_ext/training/launch.py) starts it once per rank."""

import logging
import os
from pathlib import Path

import torch.distributed as dist
from torchtitan.tools.logging import init_logger, logger

from core.errors import RefusedInput
from core.inside import refuse_links
from core.stages import STAGES, heldout_folder
from titan_ext.loader.streaming_loader import StreamingLoader
from titan_ext.training.spike_guard import NotFinite
from titan_ext.training.stage_spec import StageSpec, list_finished_checkpoints
from titan_ext.training.trainer import StageTrainer
from titan_ext.training.trainer_config import build_trainer_config


def run_stage(spec: StageSpec) -> None:
    """Train the stage to its last step on this rank; resume from `spec.out`/checkpoint where there is one.

    Raises:
        NotFinite: loss or gradient norm is not finite; the message says how to go on.
        RefusedInput: see `build_trainer`, `check_shard_cache` and `StageCheckpoints`.
    """
    trainer = build_trainer(spec)
    try:
        try:
            check_shard_cache(trainer.dataloader, spec)
            trainer.train()
        finally:
            trainer.close()
    except NotFinite as error:
        raise NotFinite(f"{error}. {advise_continuation(spec)}") from error
    dist.destroy_process_group()


def advise_continuation(spec: StageSpec) -> str:
    """Return the options that let a stage whose numbers are not finite go on from a checkpoint, as a sentence.

    The newest checkpoint may hold a model that is about to diverge, so all are named.
    """
    steps = list_finished_checkpoints(spec.out)
    rate = f"--stages.{spec.name}.learning-rate {spec.stage.learning_rate / 2:g}"
    if spec.name not in STAGES or not steps:
        return "It has no checkpoint to go on from: start it with a lower learning rate, or with other data"
    return (
        f"To go on from a checkpoint with a lower learning rate, give the same command two more options: "
        f"--continue-from {steps[-1]} {rate}. Other data or a lower max-grad-norm go as well, and an earlier "
        f"checkpoint; there are those of the steps {', '.join(map(str, steps))}"
    )


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
        shard_cache=spec.shard_cache,
        stop_file=str(spec.stop_file.absolute()) if spec.stop_file else "",
        continued_at=spec.continued_at,
        hang_seconds=spec.hang_seconds,
    )


def check_shard_cache(loader: StreamingLoader, spec: StageSpec) -> None:
    """Check that the cache of this node holds the shards that its ranks use and fetch ahead at the same time.

    A recipe is checked before its data is there, for nodes of 8 GPUs. Here the ranks of the node (LOCAL_WORLD_SIZE) and
    the sizes of the shards are known.

    Raises:
        RefusedInput: it is too small; shards would be fetched again and again.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = loader.estimate_cache_bytes(spec.parallel.count_data_ranks(local_ranks))
    if spec.shard_cache.size_bytes < needed:
        raise RefusedInput(
            f"cluster.shard_cache.size_bytes = {spec.shard_cache.size_bytes}: the shards that the {local_ranks} ranks "
            f"of this node use and fetch ahead take {needed}; set it to at least that, or use more nodes"
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
    handler = logging.StreamHandler(open(path, "a", encoding="utf-8", opener=refuse_links))  # noqa: SIM115  for the process
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
