"""This module holds trainer configurations by name, for torchtitan's own command line:

    torchrun --nproc-per-node 8 -m torchtitan.train --module titan_ext --config mobilemoe_s_pretrain \\
        --dataloader.shards /data/shards/pretrain --hf_assets_path /data/tokenizer

Names are mobilemoe_FLAVOR_STAGE with FLAVOR s, m, l or tiny and STAGE pretrain, midtrain, sft or qat; any field can be
overridden as torchtitan does it. Default paths are relative to the current folder, which should be a run folder. The
configurations work on the CPU as well.
"""

import functools
import os
from pathlib import Path

from core.stages import STAGE_FOLDERS, STAGES, heldout_folder
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.training.schedules import published_stages, tiny_stages
from titan_ext.training.trainer import StageTrainer
from titan_ext.training.trainer_config import build_trainer_config


def build_config(flavor: str, name: str) -> StageTrainer.Config:
    """Build the configuration of one stage of one flavor.

    Held-out loss is measured if the current folder has held-out shards.
    """
    tiny = flavor == "tiny"
    stage = (tiny_stages() if tiny else published_stages())[name]
    heldout = Path("data/heldout") / heldout_folder(stage.shards)
    parallel = ParallelConfig(
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        expert_parallel=1 if tiny else 4,
        precision="float32" if tiny else "bfloat16",
    )
    return build_trainer_config(
        model=FLAVORS[flavor],
        stage=stage,
        parallel=parallel,
        shards=f"data/shards/{stage.shards}",
        heldout=str(heldout) if heldout.is_dir() else None,
        tokenizer="data/tokenizer",
        out=STAGE_FOLDERS[name],
        seed=0,
        quantization=QuantizationConfig(),
        flavor=flavor,
    )


# torchtitan looks up functions by name in this module. The loop avoids sixteen functions that differ in names alone.
for _flavor in FLAVORS:
    for _stage in STAGES:
        globals()[f"mobilemoe_{_flavor.lower()}_{_stage}"] = functools.partial(build_config, _flavor, _stage)
