"""The published recipe (arXiv 2605.27358), shared by `s`, `m` and `l`; its schedule is `titan_ext.training.schedules`.

Published: EP = 4 and the shares of the domains. Not published, so assumed here: the world sizes, the exact lists of
the 6T tokens and of the 28 instruction sets. A domain whose corpora are smaller than its share repeats (docs/data.md).
"""

import math
from dataclasses import replace

from data.catalogue.open_corpora import OPEN_CORPORA
from data.config import DataConfig
from pipelines.recipe import ClusterConfig, Recipe, Stages
from titan_ext.config import ModelDims, ParallelConfig
from titan_ext.memory import estimate_memory
from titan_ext.training.schedules import PRETRAIN_TOKENS, published_stages, steps_for

CORPORA = tuple(corpus.name for corpus in OPEN_CORPORA if not corpus.non_commercial)
"""Names of all open corpora of the published families whose licences allow commercial use. If your use allows
`natural-reasoning`, `tulu-3` and `wildguardmix`, name them in `data.corpora` too and set `data.commercial_only` to
False. The shares of the domains are the stages' mixtures."""
NEEDS = """\
--data.tokenizer.path FOLDER: a tokenizer of at most 128,256 entries with Llama 3.1's special tokens (docs/data.md)
access to the Hugging Face hub (HF_TOKEN) for the corpora: {corpora}
{gpus} GPUs in a Ray cluster: run on one of its nodes, or --cluster.ray-address HOST:PORT
up to {gigabytes} GB of memory a GPU, estimated without recomputation; the default there, selective, takes less
a run folder (--out) that all nodes see"""


def describe_needs(recipe: Recipe) -> str:
    """Return the requirements that the user must provide, one a line."""
    peaks = [estimate_memory(recipe.model, stage, recipe.parallel).peak for _, stage in recipe.stages.items()]
    gigabytes = math.ceil(max(peaks) / 1e9)
    return NEEDS.format(gpus=recipe.parallel.world_size, gigabytes=gigabytes, corpora=", ".join(CORPORA))


def build_published(name: str, model: ModelDims, world_size: int, pretrain_tokens: float = PRETRAIN_TOKENS) -> Recipe:
    """Return the published recipe for a model on `world_size` GPUs.

    Args:
        pretrain_tokens: tokens of pre-training; the other stages keep the published ones.
    """
    stages = published_stages()
    pretrain = stages["pretrain"]
    steps = steps_for(pretrain_tokens, pretrain.seq_len, pretrain.global_batch_size)
    stages["pretrain"] = replace(pretrain, steps=steps, warmup_steps=min(pretrain.warmup_steps, steps // 10))
    return Recipe(
        name=name,
        model=model,
        data=DataConfig(corpora=CORPORA, commercial_only=True, near_duplicates_within="corpus", workers=64),
        stages=Stages(**stages),
        parallel=ParallelConfig(world_size=world_size, expert_parallel=4, precision="bfloat16"),
        cluster=ClusterConfig(ray_address="auto", cpus_per_worker=8, gpus_per_worker=1, cpus_per_task=8),
    )
