"""Remove near duplicates of text with datatrove's MinHash blocks, after the exact ones (data/filters/exact_dedup.py).

MinHash (14 buckets of 8 hashes over word 5-grams, datatrove's and FineWeb's setting, likely above a Jaccard similarity
of 0.75) compares text corpora only, and of them those that their publishers have not deduplicated
(`Corpus.deduplicated`). Generated questions differ in little but their numbers, which MinHash's normalisation maps to
one symbol, so it would reduce an instruction corpus to a few samples.

The last step of MinHash, clustering, is one task that holds every document with a duplicate in memory. Groups
(`assign_near_groups`) bound it: each group has signatures, buckets and clusters of its own, so a document that occurs
in two groups is kept in both.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)

from data import compat
from data.catalogue.corpus import Corpus, Unit
from data.compat import LocalFolder
from data.filters.mark_runs import remove_mark_runs
from data.filters.near_pairs import MINHASH, RANGE_ROWS, NearPairs, PairTask, count_ranges
from data.filters.spacy_cache import EnglishWords
from data.filters.time_limit import TooSlow, limit_time


def assign_near_groups(units: list[Unit], within: str) -> list[str | None]:
    """Return the name of each unit's group, in which near duplicates are searched for; None where they are not.

    Args:
        within: `DataConfig.near_duplicates_within`: one group of all units, or one a corpus.
    """
    return [assign_near_group(unit.corpus, within) for unit in units]


def assign_near_group(corpus: Corpus, within: str) -> str | None:
    """Return the name of a corpus's group, in which near duplicates are searched for; None where they are not."""
    if corpus.deduplicated:
        return None
    return "all" if within == "all" else corpus.name


def _list_names(groups: Sequence[str | None]) -> list[str]:
    return list(dict.fromkeys(name for name in groups if name is not None))


class GroupSignature(MinhashDedupSignature):
    """Writes the MinHash signatures of rank r to the folder of its group; a rank without a group has none.

    A document that it would work on for too long (data/filters/time_limit.py) gets no signature: it is kept without
    having been compared, and counted as `not_compared`. Documents are known by their position, so none can be left out.
    """

    name = "signatures"

    def __init__(self, folder: Path, groups: list[str | None]):
        super().__init__(LocalFolder(folder), MINHASH, language=EnglishWords())
        self.folder, self.groups = folder, groups

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of the rank's documents."""
        group = self.groups[rank]
        if group is None:
            return
        compat.set_signature_folder(self, self.folder / group / "signatures")
        super().run(data, rank, world_size)

    def get_shingles(self, text: str) -> np.ndarray:
        """Return the hashes of the text's word n-grams, uint64 [N, 1]; none where that takes too long."""
        try:
            with limit_time():
                return super().get_shingles(remove_mark_runs(text))
        except TooSlow:
            self.stat_update("not_compared")
            return np.empty((0, 1), np.uint64)


class EveryGroup(PipelineStep):
    """Runs a datatrove block of one task for every group: that of group g is rank g."""

    type = "🫂 - DEDUP"

    def __init__(self, name: str, block: Callable[[Path], PipelineStep], folders: list[Path]):
        self.name = name
        super().__init__()
        self.block, self.folders = block, folders

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Run the task of one group."""
        block = self.block(self.folders[rank])
        compat.share_statistics(block, self)
        block.run(data, 0, 1)


def _make_group_cluster(folder: Path) -> PipelineStep:
    # Ranks are numbered over all groups, so the lists of documents to remove may share one folder.
    return MinhashDedupCluster(LocalFolder(folder / "pairs"), LocalFolder(folder.parent / "remove"), MINHASH)


def make_near_signature(folder: Path, groups: list[str | None]) -> PipelineStep:
    """Return the last block of a step, which writes the MinHash signatures of the rank's documents."""
    return GroupSignature(folder, groups)


def make_near_buckets(
    folder: Path, groups: list[str | None], range_rows: int = RANGE_ROWS
) -> tuple[PipelineStep, list[str]]:
    """Return the block that finds pairs of documents that agree in all hashes of a bucket, and the label of each task.

    There is a task for each range of each bucket of each group. The signatures must be complete: the number of ranges
    follows from them.
    """
    tasks, labels = [], []
    for name in _list_names(groups):
        ranges = count_ranges(folder / name, range_rows)
        for bucket in range(MINHASH.num_buckets):
            for number in range(ranges):
                tasks.append(PairTask(folder / name, bucket, number, ranges))
                labels.append(f"bucket {bucket} of {name}, range {number + 1} of {ranges}")
    return NearPairs(tasks), labels


def make_near_cluster(folder: Path, groups: list[str | None]) -> tuple[PipelineStep, list[str]]:
    """Return the block that joins pairs to clusters and lists all but one document of each, and the label of each task.

    There is a task for each group.
    """
    names = _list_names(groups)
    return EveryGroup("clusters", _make_group_cluster, [folder / name for name in names]), names


def make_near_filter(folder: Path) -> PipelineStep:
    """Return the block that drops near duplicates; it knows a document by its position in the signature step."""
    return MinhashDedupFilter(LocalFolder(folder / "remove"))
