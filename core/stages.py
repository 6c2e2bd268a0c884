"""Name the four training stages and their folders."""

STAGES = ("pretrain", "midtrain", "sft", "qat")
"""Names of the training stages in the order in which they run (arXiv 2605.27358)."""
BASE_STAGES = ("pretrain", "midtrain")
"""Stages before instruction tuning: their models have seen no chat template."""
STAGE_FOLDERS = {name: f"stages/{number}_{name}" for number, name in enumerate(STAGES, 1)}
"""Stage -> the folder of its checkpoints and logs, relative to the run folder."""
SHARD_FOLDERS = ("pretrain", "midtrain", "sft")
"""Folders of training shards below the data step's `shards/`. Stage qat has none of its own: it trains on `sft`."""
HELDOUT_FOLDERS = ("pretrain", "sft")
"""Folders of held-out shards below the data step's `heldout/`: documents and conversations."""


def heldout_folder(shards: str) -> str:
    """Return the folder below `heldout/` whose loss is measured for a stage that trains on `shards`."""
    assert shards in SHARD_FOLDERS, shards
    return "sft" if shards == "sft" else "pretrain"
