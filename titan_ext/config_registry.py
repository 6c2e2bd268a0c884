"""Trainer configurations by name, for torchtitan's own command line, without the rest of this project:

    torchrun --nproc-per-node 8 -m torchtitan.train --module titan_ext --config mobilemoe_s_pretrain \\
        --dataloader.shards /data/shards/pretrain --hf_assets_path /data/tokenizer

Names are mobilemoe_FLAVOR_STAGE with FLAVOR s, m, l or tiny and STAGE pretrain, midtrain, sft or qat; any field can be
overridden as torchtitan does it. Paths default to a run folder's, seen from inside it. Works on the CPU as well.
"""

import functools
import os
from pathlib import Path

from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.training.schedules import STAGES, published_stages, tiny_stages
from titan_ext.training.trainer import StageTrainer
from titan_ext.training.trainer_config import trainer_config


def stage_trainer(flavor: str, name: str) -> StageTrainer.Config:
    """One stage of one flavor; held-out loss is measured where the current folder has held-out shards."""
    tiny = flavor == "tiny"
    stage = (tiny_stages() if tiny else published_stages())[name]
    heldout = Path("data/heldout") / ("sft" if stage.shards == "sft" else "pretrain")
    parallel = ParallelConfig(
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        expert_parallel=1 if tiny else 4,
        precision="float32" if tiny else "bfloat16",
    )
    return trainer_config(
        model=FLAVORS[flavor],
        stage=stage,
        parallel=parallel,
        shards=f"data/shards/{stage.shards}",
        heldout=str(heldout) if heldout.is_dir() else None,
        tokenizer="data/tokenizer",
        out=f"stages/{STAGES.index(name) + 1}_{name}",
        seed=0,
        quantization=QuantizationConfig(),
        flavor=flavor,
    )


# torchtitan looks names up in this module; a function each would be sixteen times the same line.
for _flavor in FLAVORS:
    for _stage in STAGES:
        globals()[f"mobilemoe_{_flavor.lower()}_{_stage}"] = functools.partial(stage_trainer, _flavor, _stage)
