"""Exact and near-duplicate removal with datatrove's blocks, over all corpora at once.

Of copies in several corpora, the corpus that is read first keeps its own: text before conversations, otherwise in the
order of the recipe.

Exact: equal text, in every corpus. Near (MinHash, 14 buckets of 8 hashes over word 5-grams, datatrove's and FineWeb's
setting, likely above a Jaccard similarity of 0.75): text corpora only. Generated questions differ in little but their
numbers, which MinHash's normalisation maps to one symbol, so it would fold an instruction corpus into a few samples.
"""

from functools import partial
from pathlib import Path

from datatrove.data import Document
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

from data.words import EnglishWords

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


def near_signature(folder: Path) -> PipelineStep:
    """Last block of a step: writes the MinHash signatures of this rank's documents."""
    return MinhashDedupSignature(str(folder / "signatures"), MINHASH, language=EnglishWords())


def near_buckets(folder: Path) -> PipelineStep:
    """`MINHASH.num_buckets` tasks: pairs that agree on a whole bucket."""
    return MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=MINHASH)


def near_cluster(folder: Path) -> PipelineStep:
    """One task: clusters of pairs, all but one document of each to be removed."""
    return MinhashDedupCluster(str(folder / "pairs"), str(folder / "remove"), MINHASH)


def near_filter(folder: Path) -> PipelineStep:
    """Drops them; must see the documents in the order that `near_signature` saw."""
    return MinhashDedupFilter(str(folder / "remove"))
