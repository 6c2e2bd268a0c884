"""Assigns documents to held-out data and to the stages, by a hash of their text."""

import hashlib

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.catalogue.corpus import Unit
from data.config import DataConfig
from data.mixture import choose_heldout_fraction, split_shares

HELDOUT = "heldout"


def assign_split(
    text: str, stages: tuple[str, ...], seed: int, heldout_fraction: float, midtrain_fraction: float
) -> str:
    """Return `heldout` or the one of `stages` (`Corpus.splits`) that a text belongs to, from its hash alone.

    One SHA-256 gives two independent uniform numbers. The first decides whether the text is held out; the second, where
    a corpus feeds both text stages, decides between pre-training and mid-training. The split is the same for every
    number of tasks, and what a smaller fraction holds out, a larger one does, too.
    """
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction:
        return HELDOUT
    if len(stages) == 1:
        return stages[0]
    return "midtrain" if int.from_bytes(digest[8:16], "big") / 2**64 < midtrain_fraction else "pretrain"


class SplitTagger(PipelineStep):
    """Writes the split of each document to `metadata["split"]` and counts the documents of each split."""

    type = "✂️ - SPLIT"
    name = "by hash"

    def __init__(self, units: list[Unit], seed: int, config: DataConfig):
        super().__init__()
        self.stages = [unit.corpus.splits for unit in units]
        self.seed = seed
        self.fractions = [
            (choose_heldout_fraction(config, unit.corpus), split_shares(config, unit.corpus).get("midtrain", 0.0))
            for unit in units
        ]  # each unit's share held out, and the share of the rest for mid-training

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield every document with its split."""
        for document in data:
            split = assign_split(document.text, self.stages[rank], self.seed, *self.fractions[rank])
            document.metadata["split"] = split
            self.stat_update(split)
            yield document
