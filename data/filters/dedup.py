"""Exact and near-duplicate removal with datatrove's blocks, over all corpora at once.

Of copies in several corpora, the corpus that is read first keeps its own: text before conversations, otherwise in the
order of the recipe.

Exact: equal text, in every corpus. Near (MinHash, 14 buckets of 8 hashes over word 5-grams, datatrove's and FineWeb's
setting, likely above a Jaccard similarity of 0.75): text corpora only. Generated questions differ in little but their
numbers, which MinHash's normalisation maps to one symbol, so it would fold an instruction corpus into a few samples.

The last step of MinHash is one task that holds every document with a duplicate. Groups (`near_groups`) bound it: each
has signatures, buckets and clusters of its own, and what two groups share is kept in both.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

from data.catalogue.corpus import Unit
from data.filters.spacy_cache import EnglishWords

HIGHEST_PRIORITY = 65_535
MINHASH = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


def _content(document: Document) -> str:
    return document.text


def _exact_config() -> ExactDedupConfig:
    return ExactDedupConfig(content_getter=_content)


def _priority(document: Document, corpora: list[str]) -> int:
    """Higher for corpora named earlier; datatrove keeps the copy of the highest priority, which is 16 bits wide."""
    return HIGHEST_PRIORITY - corpora.index(document.metadata["corpus"])


def exact_signature(folder: Path, corpora: list[str]) -> PipelineStep:
    """Last block of a step: writes the hashes of this rank's documents. `corpora` are their names in reading order."""
    config = _exact_config()
    config.document_priority = partial(_priority, corpora=corpora)
    return ExactDedupSignature(str(folder / "signatures"), config)


def exact_find(folder: Path) -> PipelineStep:
    """One task: which documents repeat an earlier one."""
    return ExactFindDedups(str(folder / "signatures"), str(folder / "duplicates"), _exact_config())


def exact_filter(folder: Path) -> PipelineStep:
    """Drops them; must see the documents in the order that `exact_signature` saw."""
    return ExactDedupFilter(str(folder / "duplicates"), _exact_config())


def near_groups(units: list[Unit], within: str) -> list[str]:
    """Of every unit, the group of documents that near duplicates are sought in: `all`, its corpus, or itself."""
    names = {
        "all": lambda unit: "all",
        "corpus": lambda unit: unit.corpus.name,
        "shard": lambda unit: f"{unit.corpus.name}.{unit.shard:05d}",
    }
    return [names[within](unit) for unit in units]


class GroupSignature(MinhashDedupSignature):
    """Writes the signatures of rank r into the folder of its group."""

    def __init__(self, folder: Path, groups: list[str]):
        super().__init__(str(folder), MINHASH, language=EnglishWords())
        self.folder, self.groups = folder, groups

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        self.output_folder = get_datafolder(str(self.folder / self.groups[rank] / "signatures"))
        super().run(data, rank, world_size)


class EveryGroup(PipelineStep):
    """A datatrove block of `tasks` tasks, once for every group: task t of group g is rank g * tasks + t."""

    type = "🫂 - DEDUP"

    def __init__(self, name: str, block: Callable[[Path], PipelineStep], folders: list[Path], tasks: int):
        self.name = name
        super().__init__()
        self.block, self.folders, self.tasks = block, folders, tasks

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        group, task = divmod(rank, self.tasks)
        block = self.block(self.folders[group])
        block.stats = self.stats
        block.run(data, task, self.tasks)


def _buckets(folder: Path) -> PipelineStep:
    return MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=MINHASH)


def _cluster(folder: Path) -> PipelineStep:
    # Ranks are numbered over all groups, so the groups' lists of what to remove lie side by side.
    return MinhashDedupCluster(str(folder / "pairs"), str(folder.parent / "remove"), MINHASH)


def near_signature(folder: Path, groups: list[str]) -> PipelineStep:
    """Last block of a step: writes the MinHash signatures of this rank's documents."""
    return GroupSignature(folder, groups)


def near_buckets(folder: Path, groups: list[str]) -> tuple[PipelineStep, int]:
    """Pairs that agree on a whole bucket. Returns the block and its number of tasks."""
    folders = _folders(folder, groups)
    return EveryGroup("buckets", _buckets, folders, MINHASH.num_buckets), len(folders) * MINHASH.num_buckets


def near_cluster(folder: Path, groups: list[str]) -> tuple[PipelineStep, int]:
    """Clusters of pairs, all but one document of each to be removed. Returns the block and its number of tasks."""
    folders = _folders(folder, groups)
    return EveryGroup("clusters", _cluster, folders, 1), len(folders)


def near_filter(folder: Path) -> PipelineStep:
    """Drops them; must see the documents in the order that `near_signature` saw."""
    return MinhashDedupFilter(str(folder / "remove"))


def _folders(folder: Path, groups: list[str]) -> list[Path]:
    return [folder / group for group in dict.fromkeys(groups)]
