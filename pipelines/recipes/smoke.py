"""`smoke`: the whole way on one CPU machine, in minutes, from texts that Python packages carry."""

from data.config import DataConfig, TokenizerConfig
from data.corpora import SMOKE_CORPORA
from eval.config import EvaluationConfig
from pipelines.recipe import ClusterConfig, Recipe, Stages
from titan_ext.config import FLAVORS, ParallelConfig, QATConfig, StageConfig

PRETRAIN_MIXTURE = {"web": 0.62, "math": 0.116, "code": 0.10, "knowledge": 0.10, "science": 0.064}
MIDTRAIN_MIXTURE = {"web": 0.09, "knowledge": 0.32, "code": 0.22, "math": 0.21, "science": 0.16}
SFT_MIXTURE = {"math": 0.32, "chat": 0.26, "code": 0.22, "tool_use": 0.10, "reasoning": 0.10}


def recipe() -> Recipe:
    """A tiny model through all four stages on two gloo processes.

    The published schedules scaled down: the same mixtures, contexts growing from pre-training to mid-training,
    learning rates falling from stage to stage (though not by the published powers of ten, which would train nothing
    in so few steps), and the expert bias moving by 1e-2 a step instead of 1e-3: with so few steps, routing that
    collapses at the start would otherwise still be uneven at the end.
    """
    long_context = {"seq_len": 512, "global_batch_size": 8, "local_batch_size": 4}
    instructions = {**long_context, "shards": "sft", "mixture": SFT_MIXTURE}
    every_stage = {"expert_bias_update_rate": 1e-2, "heldout_batches": 6, "log_interval": 5}
    return Recipe(
        name="smoke",
        model=FLAVORS["tiny"],
        data=DataConfig(
            corpora=SMOKE_CORPORA, tokenizer=TokenizerConfig(train_vocab_size=4096), heldout_fraction=0.04
        ),
        stages=Stages(
            pretrain=StageConfig(
                steps=260, seq_len=256, global_batch_size=16, local_batch_size=8, learning_rate=3e-3,
                shards="pretrain", mixture=PRETRAIN_MIXTURE, schedule="cosine", warmup_steps=20,
                checkpoint_interval=40, heldout_interval=65, **every_stage,
            ),
            midtrain=StageConfig(
                steps=60, learning_rate=2e-3,
                shards="midtrain", mixture=MIDTRAIN_MIXTURE, schedule="linear", warmup_steps=6,
                checkpoint_interval=20, heldout_interval=30, **long_context, **every_stage,
            ),
            sft=StageConfig(
                steps=60, learning_rate=1.5e-3, schedule="cosine", warmup_steps=6,
                checkpoint_interval=20, heldout_interval=30, **instructions, **every_stage,
            ),
            qat=StageConfig(
                steps=40, learning_rate=5e-4, schedule="cosine", warmup_steps=5, qat=QATConfig(),
                checkpoint_interval=20, heldout_interval=20, **instructions, **every_stage,
            ),
        ),
        parallel=ParallelConfig(world_size=2, expert_parallel=2, precision="float32"),
        evaluation=EvaluationConfig(limit=12, heldout_tokens=20_000, allow_missing_items=True),
        cluster=ClusterConfig(cpus_per_worker=1, cpus_per_task=2),
    )  # fmt: skip
