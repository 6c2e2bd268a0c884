"""The published recipe (arXiv 2605.27358), shared by `s`, `m` and `l`; its schedule is `titan_ext.training.schedules`.

Not published, so assumed here: the world sizes, the exact lists of the 6T tokens and of the 28 instruction sets. Two
things differ from the paper, and `mobilemoe plan` shows both:

- The shares of the domains are the published ones, except that no domain repeats more often than `data.max_epochs`
  allows with the corpora of the catalogue. The open conversations on safety are so few that 9.4% of instruction tuning
  would repeat them hundreds of times. Their share is lowered, and the other domains grow in proportion.
- The paper shares the experts over 4 GPUs. Here the layout is chosen for `cluster.gpu` and `cluster.network_gbits`
  (titan_ext/layout.py). On the GPUs known, each computes with all experts, and a node shards the weights (HSDP).
  The trained model is the same. `--parallel.expert-parallel 4 --parallel.data-parallel-replicate 1` is the paper's
  layout.
"""

import math
from dataclasses import replace

from data.catalogue.open_corpora import OPEN_CORPORA
from data.config import DataConfig
from data.mixture import balance_midtrain, count_split_tokens, limit_shares
from pipelines.recipe import ClusterConfig, Recipe, Stages
from pipelines.validation.memory_rules import estimate_stages
from titan_ext.config import ModelDims, ParallelConfig, StageConfig
from titan_ext.training.schedules import PRETRAIN_TOKENS, published_stages, steps_for

CORPORA = tuple(corpus.name for corpus in OPEN_CORPORA if not corpus.non_commercial)
"""Names of all open corpora of the published families whose licences allow commercial use. If your use allows
`natural-reasoning`, `tulu-3` and `wildguardmix`, name them in `data.corpora` too and set `data.commercial_only` to
False. The shares of the domains are the stages' mixtures."""
NEEDS = """\
--data.tokenizer.path FOLDER: a tokenizer of at most 128,256 entries with Llama 3.1's special tokens (docs/data.md)
access to the Hugging Face hub (HF_TOKEN) for the corpora: {corpora}
{gpus} GPUs in a Ray cluster: run on one of its nodes, or --cluster.ray-address HOST:PORT
{gigabytes} GB of memory a GPU by the estimate of `mobilemoe plan`, and a tenth more
a run folder (--out) that all nodes see"""


def describe_needs(recipe: Recipe) -> str:
    """Return the requirements that the user must provide, one a line."""
    gigabytes = math.ceil(max(estimate.peak for estimate in estimate_stages(recipe).values()) / 1e9)
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
    data = DataConfig(corpora=CORPORA, commercial_only=True, near_duplicates_within="corpus", workers=64)
    wanted = count_domains(stages["pretrain"]), count_domains(stages["midtrain"])
    data = replace(data, midtrain_fraction=balance_midtrain(data, *wanted))
    return Recipe(
        name=name,
        model=model,
        data=data,
        stages=Stages(**limit_mixtures(stages, data)),
        parallel=ParallelConfig(world_size=world_size, expert_parallel=None, data_parallel_replicate=None),
        cluster=ClusterConfig(ray_address="auto", cpus_per_worker=8, gpus_per_worker=1, cpus_per_task=8),
    )


def count_domains(stage: StageConfig) -> dict[str, float]:
    """Return the tokens that a stage takes of each domain."""
    return {domain: share * stage.tokens for domain, share in stage.mixture.items()}


def limit_mixtures(stages: dict[str, StageConfig], data: DataConfig) -> dict[str, StageConfig]:
    """Return the stages with mixtures that repeat no domain more often than `data.max_epochs`.

    The stage qat has the mixture of instruction tuning, as in the paper.
    """
    available = count_split_tokens(data)
    limited = {
        name: replace(
            stage,
            mixture=limit_shares(stage.mixture, stage.tokens, available[stage.shards], data.max_epochs[name]),
        )
        for name, stage in stages.items()
    }
    return limited | {"qat": replace(limited["qat"], mixture=limited["sft"].mixture)}
