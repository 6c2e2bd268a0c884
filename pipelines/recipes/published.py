"""The published schedule (arXiv 2605.27358, training table), shared by the recipes `s`, `m` and `l`.

Published: tokens 6T / 500B / 126B / 21B, contexts 2,048 / 8,192 / 8,192 / 8,192, learning rates 4e-4 / 4e-5 / 4e-6 /
4e-6, cosine except mid-training's linear, the mixtures, EP = 4, router z-loss 1e-4, expert bias rate 1e-3, INT4 groups
of 32. Not published, so assumed here: global batches of 4.2M tokens (text stages) and 2.1M tokens (sft, qat), warm-up
of 2,000 steps (text) and 3% (sft, qat), decay to a tenth, AdamW betas 0.9 / 0.95, weight decay 0.1, the world sizes.
"""

from data.config import DataConfig
from pipelines.recipe import ClusterConfig, Recipe, Stages
from titan_ext.config import FLAVORS, ParallelConfig, QATConfig, StageConfig

PRETRAIN_TOKENS, MIDTRAIN_TOKENS, SFT_TOKENS, QAT_TOKENS = 6e12, 500e9, 126e9, 21e9
PRETRAIN_MIXTURE = {"web": 0.62, "math": 0.116, "code": 0.10, "knowledge": 0.10, "science": 0.064}
MIDTRAIN_MIXTURE = {"web": 0.09, "knowledge": 0.32, "code": 0.22, "math": 0.21, "science": 0.16}
SFT_MIXTURE = {
    "math": 0.304, "chat": 0.254, "code": 0.221, "safety": 0.094, "science": 0.077, "tool_use": 0.039,
    "reasoning": 0.011,
}  # fmt: skip

CORPORA = (
    "fineweb-edu", "finemath", "wikipedia", "starcoder", "pes2o",
    "open-math-instruct-2", "open-code-instruct", "natural-reasoning",
    "nemotron-chat", "nemotron-tools", "nemotron-stem", "nemotron-safety",
)  # fmt: skip
"""Open corpora of the published families; the exact lists of the 6T tokens and of the 28 SFT sets are not published."""
NEEDS = """\
--data.tokenizer.path FOLDER: a tokenizer of at most 128,256 entries with Llama 3's special tokens
access to the Hugging Face hub (HF_TOKEN) for the corpora: {corpora}
{gpus} GPUs in a Ray cluster: run on one of its nodes, or --cluster.ray-address HOST:PORT
a run folder (--out) that all nodes see"""


def needs(world_size: int) -> str:
    """What the user has to bring."""
    return NEEDS.format(gpus=world_size, corpora=", ".join(CORPORA))


def steps_for(tokens: float, seq_len: int, global_batch_size: int) -> int:
    """Optimizer steps that train on `tokens` tokens, rounded up."""
    return -int(-tokens // (seq_len * global_batch_size))


def published(flavor: str, world_size: int) -> Recipe:
    """The recipe of one flavor (S, M or L) on `world_size` GPUs."""

    def stage(tokens: float, seq_len: int, batch: int, local_batch: int, **kwargs) -> StageConfig:
        return StageConfig(
            steps=steps_for(tokens, seq_len, batch), seq_len=seq_len, global_batch_size=batch,
            local_batch_size=local_batch, checkpoint_interval=1000, heldout_interval=1000, **kwargs,
        )  # fmt: skip

    chat = {"shards": "sft", "mixture": SFT_MIXTURE, "learning_rate": 4e-6, "schedule": "cosine"}
    return Recipe(
        name=flavor.lower(),
        model=FLAVORS[flavor],
        data=DataConfig(corpora=CORPORA, workers=64),
        stages=Stages(
            pretrain=stage(
                PRETRAIN_TOKENS, 2048, 2048, 8, shards="pretrain", mixture=PRETRAIN_MIXTURE, learning_rate=4e-4,
                schedule="cosine", warmup_steps=2000,
            ),
            midtrain=stage(
                MIDTRAIN_TOKENS, 8192, 512, 2, shards="midtrain", mixture=MIDTRAIN_MIXTURE, learning_rate=4e-5,
                schedule="linear", warmup_steps=2000,
            ),
            sft=stage(SFT_TOKENS, 8192, 256, 1, warmup_steps=1800, **chat),
            qat=stage(QAT_TOKENS, 8192, 256, 1, warmup_steps=300, qat=QATConfig(), **chat),
        ),
        parallel=ParallelConfig(world_size=world_size, expert_parallel=4, precision="bfloat16"),
        cluster=ClusterConfig(ray_address="auto", cpus_per_worker=8, gpus_per_worker=1, cpus_per_task=8),
    )  # fmt: skip
