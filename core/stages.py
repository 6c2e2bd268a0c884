"""The four training stages by name, and the folders that belong to them."""

STAGES = ("pretrain", "midtrain", "sft", "qat")
"""In the order they run (arXiv 2605.27358)."""
STAGE_FOLDERS = {name: f"stages/{number}_{name}" for number, name in enumerate(STAGES, 1)}
"""Stage -> its folder below the run folder."""
SHARD_FOLDERS = ("pretrain", "midtrain", "sft")
"""Folders below the data step's `shards/`; qat trains on `sft`."""
HELDOUT_FOLDERS = ("pretrain", "sft")
"""Folders below the data step's `heldout/`: text and conversations."""


def heldout_folder(shards: str) -> str:
    """Return the folder below `heldout/` that a stage trained on `shards` is measured on."""
    assert shards in SHARD_FOLDERS, shards
    return "sft" if shards == "sft" else "pretrain"
