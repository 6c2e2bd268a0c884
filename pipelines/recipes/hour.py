"""The recipe `hour`: a small model that knows something, in at most an hour on two cores.

Its texts are generated questions (data/readers/generated_questions.py), easy ones in pre-training and hard ones from
then on. The suite `questions` asks questions of the same kinds that no training text holds (docs/evaluation.md).
"""

from dataclasses import replace
from typing import Any

from data.catalogue.corpora import QUESTION_CORPORA
from data.config import DataConfig, TokenizerConfig
from eval.config import EvaluationConfig
from pipelines.recipe import ClusterConfig, Recipe, Stages
from titan_ext.config import FLAVORS, ParallelConfig, StageConfig

TEXT_MIXTURE = {"math": 0.4, "knowledge": 0.6}
SFT_MIXTURE = {"math": 0.4, "reasoning": 0.6}
"""Four of the ten kinds have numbers, six have words."""


def recipe() -> Recipe:
    """Return the recipe of a model with 16 experts a layer and a vocabulary of little more than bytes."""
    every_stage: dict[str, Any] = {
        "seq_len": 256, "global_batch_size": 16, "local_batch_size": 8, "expert_bias_update_rate": 1e-2,
        "heldout_batches": 4, "skip_spikes_sigma": 6.0,
    }  # fmt: skip
    text: dict[str, Any] = {"mixture": TEXT_MIXTURE, "capacity_factor": 1.5, "checkpoint_interval": 400, **every_stage}
    chat: dict[str, Any] = {"shards": "sft", "mixture": SFT_MIXTURE, "checkpoint_interval": 200, **every_stage}
    return Recipe(
        name="hour",
        model=replace(FLAVORS["tiny"], vocab_size=640, max_seq_len=512),
        data=DataConfig(
            corpora=QUESTION_CORPORA, languages=(), filters=(), heldout_fraction=0.02,
            tokenizer=TokenizerConfig(train_vocab_size=640, single_digits=True),
        ),
        stages=Stages(
            pretrain=StageConfig(
                steps=1200, learning_rate=2e-3, shards="pretrain", schedule="cosine", warmup_steps=100,
                heldout_interval=400, **text,
            ),
            midtrain=StageConfig(
                steps=1600, learning_rate=2e-3, shards="midtrain", schedule="linear", warmup_steps=50,
                heldout_interval=400, **text,
            ),
            sft=StageConfig(
                steps=600, learning_rate=6e-4, schedule="cosine", warmup_steps=20, heldout_interval=200, **chat
            ),
            qat=StageConfig(
                steps=200, learning_rate=3e-4, schedule="cosine", warmup_steps=10, quantize=True, heldout_interval=100,
                **chat,
            ),
        ),
        parallel=ParallelConfig(world_size=2, expert_parallel=2, precision="float32"),
        evaluation=EvaluationConfig(suite="questions", heldout_tokens=50_000, allow_missing_items=True),
        cluster=ClusterConfig(cpus_per_worker=1, cpus_per_task=2),
    )  # fmt: skip
