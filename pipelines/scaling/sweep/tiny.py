"""The sweep `tiny`: models of 0.1M to 0.5M active parameters on two CPU cores, in less than an hour.

Data and cluster are the recipe `smoke`'s, with a tokenizer of half the size, because the embedding of 4,096 entries
would be most of so small a model. The mixture is that of the texts at hand, so that no domain repeats.
"""

from dataclasses import replace

from data.catalogue.corpus import TEXT_DOMAINS
from data.config import TokenizerConfig
from pipelines.recipe import Recipe
from pipelines.recipes import smoke
from pipelines.scaling.sweep.grid import Grid, Sweep
from titan_ext.config import ModelDims, ParallelConfig

VOCAB_SIZE = 2048
SEQ_LEN = 256
MIXTURE = {"knowledge": 0.30, "code": 0.28, "science": 0.19, "math": 0.15, "web": 0.08}
TOKENS = (0.3e6, 0.6e6, 1.2e6)


def build_recipe() -> Recipe:
    """Return the recipe that all points share: one rank on one core each, 1,024 tokens a step."""
    base = smoke.recipe()
    pretrain = replace(
        base.stages.pretrain, seq_len=SEQ_LEN, global_batch_size=4, local_batch_size=4, mixture=MIXTURE,
        schedule="linear", warmup_steps=50, min_lr_factor=0.0, skip_spikes_sigma=None, heldout_batches=100,
        log_interval=40, checkpoint_interval=200,
    )  # fmt: skip
    return replace(
        base,
        name="sweep-tiny",
        model=ModelDims(
            d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, expert_hidden=32, shared_hidden=128,
            n_experts=60, top_k=4, vocab_size=VOCAB_SIZE, max_seq_len=512,
        ),
        data=replace(
            base.data, tokenizer=TokenizerConfig(train_vocab_size=VOCAB_SIZE),
            midtrain_fraction=dict.fromkeys(TEXT_DOMAINS, 0.02),
        ),
        stages=replace(base.stages, pretrain=pretrain),
        parallel=ParallelConfig(world_size=1, precision="float32"),
    )  # fmt: skip


def sweep() -> Sweep:
    """Return the grids: sizes, experts and granularity; a model without shared expert; the learning rate."""
    return Sweep(
        recipe=build_recipe(),
        learning_rate=2.5e-3,
        base_width=64,
        grids=(
            Grid(d_model=(32,), experts=(1, 4, 8), granularity=(1, 8), tokens=TOKENS),
            Grid(d_model=(64,), experts=(1, 4, 8), granularity=(1, 4, 8), tokens=TOKENS),
            Grid(d_model=(96,), experts=(1, 4, 8), tokens=TOKENS),
            # A dense model with more parameters than most of those with experts have in all, for equal memory.
            Grid(d_model=(128,), experts=(1,), tokens=TOKENS),
            Grid(d_model=(64,), experts=(8,), shared=(False,), tokens=TOKENS),
            Grid(d_model=(32, 96), experts=(8,), tokens=TOKENS[:1], learning_rate_factors=(0.5, 1.0, 2.0)),
        ),
    )
