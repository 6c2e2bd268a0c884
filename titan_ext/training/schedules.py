"""Values of the four stages: the published schedule, and its miniature for the flavor `tiny`.

torchtitan computes the learning-rate curve. titan_ext/training/trainer_config.py passes warm-up, decay and last
learning rate to it.

Published (arXiv 2605.27358, training table): tokens 6T / 500B / 126B / 21B, contexts 2,048 / 8,192 / 8,192 / 8,192,
learning rates 4e-4 / 4e-5 / 4e-6 / 4e-6, cosine except mid-training's linear, the mixtures, router z-loss 1e-4, expert
bias rate 1e-3, capacity factor 1.5 in the text stages and no dropped token after them, INT4 groups of 32. Not
published, so assumed here: global batches of 4.2M tokens (text stages) and 2.1M tokens (sft, qat), warm-up of 2,000
steps (text) and 3% (sft, qat), decay to a tenth, AdamW betas 0.9 / 0.95, weight decay 0.1, steps over 6 sigma skipped.
"""

from dataclasses import replace
from typing import Any

from titan_ext.config import StageConfig

PRETRAIN_TOKENS, MIDTRAIN_TOKENS, SFT_TOKENS, QAT_TOKENS = 6e12, 500e9, 126e9, 21e9
PRETRAIN_MIXTURE = {"web": 0.62, "math": 0.116, "code": 0.10, "knowledge": 0.10, "science": 0.064}
MIDTRAIN_MIXTURE = {"web": 0.09, "knowledge": 0.32, "code": 0.22, "math": 0.21, "science": 0.16}
SFT_MIXTURE = {
    "math": 0.304, "chat": 0.254, "code": 0.221, "safety": 0.094, "science": 0.077, "tool_use": 0.039,
    "reasoning": 0.011,
}  # fmt: skip
TINY_SFT_MIXTURE = {"math": 0.32, "chat": 0.26, "code": 0.22, "tool_use": 0.10, "reasoning": 0.10}
"""Shares of the domains of the conversations that Python packages contain."""
CAPACITY_FACTOR = 1.5
"""Room of an expert in multiples of its balanced share of the tokens, in the text stages."""


CHECKPOINT_MINUTES = 10
PERMANENT_CHECKPOINTS = {"pretrain": 200e9, "midtrain": 50e9, "sft": 20e9, "qat": 5e9}
"""Trained tokens between two checkpoints that are kept for good: 29, 10, 6 and 4 of a stage."""


def steps_for(tokens: float, seq_len: int, global_batch_size: int) -> int:
    """Return the number of optimizer steps that train on `tokens` tokens, rounded up."""
    return -int(-tokens // (seq_len * global_batch_size))


def published_stages() -> dict[str, StageConfig]:
    """Return the schedule of S, M and L: name -> stage."""

    def stage(tokens: float, seq_len: int, batch: int, local_batch: int, **kwargs: Any) -> StageConfig:
        return StageConfig(
            steps=steps_for(tokens, seq_len, batch), seq_len=seq_len, global_batch_size=batch,
            local_batch_size=local_batch, checkpoint_interval=0, checkpoint_minutes=CHECKPOINT_MINUTES,
            checkpoints_kept=3, heldout_interval=1000, skip_spikes_sigma=6.0, **kwargs,
        )  # fmt: skip

    text = {"warmup_steps": 2000, "capacity_factor": CAPACITY_FACTOR}
    chat = {"shards": "sft", "mixture": SFT_MIXTURE, "learning_rate": 4e-6, "schedule": "cosine"}
    stages = {
        "pretrain": stage(
            PRETRAIN_TOKENS, 2048, 2048, 8, shards="pretrain", mixture=PRETRAIN_MIXTURE, learning_rate=4e-4,
            schedule="cosine", **text,
        ),
        "midtrain": stage(
            MIDTRAIN_TOKENS, 8192, 512, 2, shards="midtrain", mixture=MIDTRAIN_MIXTURE, learning_rate=4e-5,
            schedule="linear", **text,
        ),
        "sft": stage(SFT_TOKENS, 8192, 256, 1, warmup_steps=1800, **chat),
        "qat": stage(QAT_TOKENS, 8192, 256, 1, warmup_steps=300, quantize=True, **chat),
    }  # fmt: skip
    return {
        name: replace(stage, checkpoint_permanent_tokens=PERMANENT_CHECKPOINTS[name]) for name, stage in stages.items()
    }


def tiny_stages() -> dict[str, StageConfig]:
    """Return the published schedule scaled down to minutes on two cores: name -> stage.

    Pre-training takes many small steps: with half as many steps of twice the batch and twice the rate the loss had
    spikes on some machines, and was higher after the same tokens.

    Mixtures and dispatch are the published ones. The context grows from pre-training to mid-training, and the learning
    rate falls from stage to stage, though not by the published powers of ten, which would train nothing in so few
    steps. The expert bias moves by 1e-2 per step instead of 1e-3. Otherwise routing that collapses at the start would
    still be uneven after so few steps.
    """
    long_context: dict[str, Any] = {"seq_len": 512, "global_batch_size": 8, "local_batch_size": 4}
    text: dict[str, Any] = {"capacity_factor": CAPACITY_FACTOR}
    instructions: dict[str, Any] = {**long_context, "shards": "sft", "mixture": TINY_SFT_MIXTURE}
    every_stage: dict[str, Any] = {
        "expert_bias_update_rate": 1e-2, "heldout_batches": 6, "log_interval": 5, "skip_spikes_sigma": 6.0,
    }  # fmt: skip
    return {
        "pretrain": StageConfig(
            steps=300, seq_len=256, global_batch_size=8, local_batch_size=4, learning_rate=1.5e-3,
            shards="pretrain", mixture=PRETRAIN_MIXTURE, schedule="cosine", warmup_steps=60,
            checkpoint_interval=60, heldout_interval=100, **text, **every_stage,
        ),
        "midtrain": StageConfig(
            steps=30, learning_rate=1.2e-3,
            shards="midtrain", mixture=MIDTRAIN_MIXTURE, schedule="linear", warmup_steps=3,
            checkpoint_interval=15, heldout_interval=15, **text, **long_context, **every_stage,
        ),
        "sft": StageConfig(
            steps=40, learning_rate=1e-3, schedule="cosine", warmup_steps=4,
            checkpoint_interval=20, heldout_interval=20, **instructions, **every_stage,
        ),
        "qat": StageConfig(
            steps=24, learning_rate=5e-4, schedule="cosine", warmup_steps=3, quantize=True,
            checkpoint_interval=12, heldout_interval=12, **instructions, **every_stage,
        ),
    }  # fmt: skip
