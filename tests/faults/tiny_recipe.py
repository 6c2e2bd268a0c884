"""The recipe of the fault suite: every step for real, and so small that a run mostly starts processes."""

import dataclasses

from data.config import DataConfig, TokenizerConfig
from eval.config import EvaluationConfig, ExportConfig
from pipelines.recipe import ClusterConfig, Recipe, Stages
from titan_ext.config import ModelDims, ParallelConfig
from titan_ext.training.schedules import tiny_stages

STEPS = {"pretrain": 16, "midtrain": 2, "sft": 2, "qat": 4}
MIXTURES = {"pretrain": {"knowledge": 1.0}, "midtrain": {"knowledge": 1.0}, "sft": {"chat": 1.0}, "qat": {"chat": 1.0}}


def recipe() -> Recipe:
    """Return a model of one layer, trained on two gloo processes on texts that need no package of a registry."""
    stages = {
        name: dataclasses.replace(
            stage, steps=STEPS[name], seq_len=64, global_batch_size=4, local_batch_size=2, warmup_steps=1,
            mixture=MIXTURES[name], log_interval=1, checkpoint_interval=2, heldout_interval=8, heldout_batches=1,
        )
        for name, stage in tiny_stages().items()
    }  # fmt: skip
    return Recipe(
        name="faults",
        model=ModelDims(
            d_model=64, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=32, expert_hidden=32, shared_hidden=64,
            n_experts=8, top_k=2, vocab_size=512, max_seq_len=128,
        ),
        data=DataConfig(
            corpora=("python-topics", "stdlib-questions"), tokenizer=TokenizerConfig(train_vocab_size=512),
            heldout_fraction=0.04, workers=1,
        ),
        stages=Stages(**stages),
        parallel=ParallelConfig(world_size=2, expert_parallel=2, precision="float32"),
        evaluation=EvaluationConfig(
            benchmarks=("piqa",), limit=2, heldout_tokens=1000, allow_missing_items=True
        ),
        export=ExportConfig(formats=("gguf",), profile_contexts=()),
        cluster=ClusterConfig(cpus_per_worker=1, cpus_per_task=1),
    )  # fmt: skip
