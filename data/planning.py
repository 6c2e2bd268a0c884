"""From measured rates to what a data set of a given size costs: shards, files, core-hours, storage, memory."""

import math
from dataclasses import dataclass

from core.errors import RefusedInput
from data.config import DataConfig


@dataclass(frozen=True)
class Rates:
    """Of one core, on text of the web's kind; docs/data.md has those measured."""

    clean: float
    """MB of text a second through steps 1 to 4 and 7: repair, filter, redact, deduplicate, decontaminate."""
    tokenize: float
    """MB of text a second through step 9: read, tokenize, write."""
    cluster_seconds: float
    """Of the one task of step 6, a million documents that have a duplicate; it holds no others."""
    cluster_bytes: float
    """Peak memory of that task, a document."""
    signature_bytes: float
    """MinHash signatures on disk, a document."""
    text_bytes_per_token: float = 4.5
    """With Llama 3's vocabulary: 4.70 on 300 documents of C4; 4.33 is what DCLM's publishers count with their own."""
    shard_bytes_per_token: float = 1.75
    """Of a zstd shard: 1.72 on the same; uncompressed it is 4."""
    tokens_per_document: float = 700
    """525 on the same, 1,308 as DCLM's publishers count."""


MEASURED = Rates(clean=0.38, tokenize=1.37, cluster_seconds=8, cluster_bytes=180, signature_bytes=952)
"""On the machine of docs/data.md, a slow one. `clean` is the blocks of web prose one after the other."""


@dataclass(frozen=True)
class DataPlan:
    """What it takes; bytes are bytes."""

    documents: int
    text_bytes: int
    clean_core_hours: float
    tokenize_core_hours: float
    cluster_hours: float
    """Wall clock of the largest group's task; it does not get faster with more cores."""
    cluster_memory_bytes: int
    """Of that task, where every document has a duplicate."""
    shards: int
    files: int
    """Shards and one index a domain of each stage."""
    shard_object_bytes: int
    """A full shard as an object in a store."""
    storage_bytes: int
    work_bytes: int
    """Beside the shards while the step runs: cleaned text, compressed, twice, and signatures."""
    loader_cache_bytes: int
    """A node's cache of unpacked shards for one pass in order: the groups in use and the next ones of every domain."""

    def hours_on(self, cores: int) -> float:
        """Wall clock on so many cores, the single task included."""
        return (self.clean_core_hours + self.tokenize_core_hours) / cores + self.cluster_hours


TEXT_COMPRESSION = 3.0
"""Text to zstd jsonl, by size."""
TEXT_COPIES = 2
DOMAINS = 5
SHARDS_AHEAD = 32
"""titan_ext.loader.domain: groups of 16 shards, the one in use and the next."""


def plan_data(
    tokens: float,
    rates: Rates,
    *,
    shard_bytes: int = DataConfig.shard_bytes,
    kept: float = 1.0,
    largest_group: float = 1.0,
) -> DataPlan:
    """Cost of preparing `tokens` tokens.

    Args:
        kept: share of the text that survives cleaning; published corpora are filtered already.
        largest_group: share of the documents in the largest group that near duplicates are sought in
            (`DataConfig.near_duplicates_within`): 1 for `all`, 1/64 of a corpus's share for `shard`.
    Raises:
        RefusedInput: `tokens`, `kept` or `largest_group` make no sense.
    """
    if tokens <= 0:
        raise RefusedInput(f"tokens is {tokens}: must be positive")
    if not 0 < kept <= 1:
        raise RefusedInput(f"kept is {kept}: the share of the text that is kept lies above 0 and is at most 1")
    if not 0 < largest_group <= 1:
        raise RefusedInput(f"largest_group is {largest_group}: a share of the documents lies above 0 and is at most 1")
    text = tokens * rates.text_bytes_per_token / kept
    documents = tokens / rates.tokens_per_document / kept
    shards = math.ceil(tokens * 4 / shard_bytes)
    return DataPlan(
        documents=round(documents),
        text_bytes=round(text),
        clean_core_hours=text / 1e6 / rates.clean / 3600,
        tokenize_core_hours=text * kept / 1e6 / rates.tokenize / 3600,
        cluster_hours=documents * largest_group / 1e6 * rates.cluster_seconds / 3600,
        cluster_memory_bytes=round(documents * largest_group * rates.cluster_bytes),
        shards=shards,
        files=shards + DOMAINS,
        shard_object_bytes=round(shard_bytes / 4 * rates.shard_bytes_per_token),
        storage_bytes=round(tokens * rates.shard_bytes_per_token),
        work_bytes=round(TEXT_COPIES * text / TEXT_COMPRESSION + documents * rates.signature_bytes),
        loader_cache_bytes=DOMAINS * SHARDS_AHEAD * shard_bytes,
    )
