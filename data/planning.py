"""Estimate what it costs to prepare a data set from measured rates: shards, files, core-hours, storage, memory.

The steps are those of data/pipeline.py.
"""

import math
from dataclasses import dataclass

from core.errors import RefusedInput
from data.config import DataConfig
from data.sources import UNIT_TEXT_BYTES


@dataclass(frozen=True)
class Rates:
    """Rates of one core, and sizes, for text from the web; docs/data.md has measured ones."""

    clean: float
    """MB of text a second through steps 1 to 4 and 7: repair, filter, redact, deduplicate, decontaminate. Blocks whose
    work the publishers have done count for nothing (`Corpus.quality_filtered` and the facts beside it)."""
    tokenize: float
    """MB of text a second through step 9: read, tokenize, write."""
    cluster_seconds: float
    """Seconds that step 6, which is one task a group, needs for a million documents with a duplicate. Documents without
    a duplicate cost it nothing."""
    cluster_bytes: float
    """Peak memory of that task in bytes a document with a duplicate."""
    signature_bytes: float
    """Size of the MinHash signatures on disk, in bytes a document."""
    text_bytes_per_token: float = 4.5
    """Bytes of text a token with Llama 3's vocabulary: measured 4.70 on 300 documents of C4; DCLM's publishers count
    4.33 with a vocabulary of their own."""
    shard_bytes_per_token: float = 1.75
    """Bytes of a zstd shard a token: measured 1.72 on the same documents of C4; uncompressed it is 4."""
    tokens_per_document: float = 700
    """Tokens a document: measured 525 on the same documents of C4; DCLM's publishers count 1,308."""


MEASURED = Rates(clean=1.70, tokenize=1.37, cluster_seconds=8, cluster_bytes=180, signature_bytes=952)
"""Rates of the slow machine of docs/data.md, a busy AMD EPYC. `clean` is that of web prose that its publisher has
filtered, as 22.6 of the 26.9 TB of the open text corpora are. Web prose that nobody has filtered takes 0.33 MB/s."""


@dataclass(frozen=True)
class DataPlan:
    """Estimated cost of preparing a data set; sizes are in bytes."""

    documents: int
    text_bytes: int
    clean_core_hours: float
    tokenize_core_hours: float
    units: int
    """Number of units, each the work of one core at a time."""
    longest_unit_hours: float
    """Hours of one core for the largest unit, in all steps."""
    cluster_hours: float
    """Wall-clock hours of step 6 for the largest group. It is a single task: more cores do not make it faster."""
    cluster_memory_bytes: int
    """Peak memory of that task, in the worst case that every document has a duplicate."""
    shards: int
    """Number of shards."""
    files: int
    """Number of shards and of the indexes, one a domain."""
    shard_object_bytes: int
    """Compressed size of a full shard, an object in a store."""
    storage_bytes: int
    """Compressed size of all shards."""
    peak_bytes: int
    """Disk at the worst moment: one compressed copy of the text with the signatures, or the shards. A task's input is
    emptied when the task is completed, so shards grow as the text shrinks. The files of tasks at work come on top."""
    loader_cache_bytes: int
    """Size of a node's cache of unpacked shards where 8 nodes train: for every domain and section of the node, the
    shards in use, ahead and just left."""

    def estimate_hours(self, cores: int) -> float:
        """Return the wall-clock hours on a number of cores, no fewer than the longest unit takes, and step 6."""
        divided = (self.clean_core_hours + self.tokenize_core_hours) / min(cores, self.units)
        return max(divided, self.longest_unit_hours) + self.cluster_hours


TEXT_COMPRESSION = 3.0
"""Size of text divided by its size as zstd jsonl."""
DOMAINS = 5
"""Number of text domains (data.catalogue.corpus.TEXT_DOMAINS)."""
SHARDS_HELD = 4 * 6
"""Number of unpacked shards of a domain on one of 8 nodes: 6 for each of 4 sections (titan_ext/loader/order.py)."""
TOKEN_BYTES = 4
"""Uncompressed size of a token in a shard: uint32."""


def plan_data(
    tokens: float,
    rates: Rates,
    *,
    shard_bytes: int = DataConfig.shard_bytes,
    kept: float = 1.0,
    largest_group: float = 1.0,
    compared: float = 1.0,
    largest_unit: float = UNIT_TEXT_BYTES,
) -> DataPlan:
    """Estimate the cost of preparing `tokens` tokens.

    Args:
        tokens: number of tokens in the shards.
        kept: share of the text that cleaning keeps; published corpora are filtered already.
        largest_group: share of the documents in the largest group that near duplicates are searched for in
            (`DataConfig.near_duplicates_within`): 1 for `all`, the share of the largest corpus for `corpus`. Corpora
            that their publishers have deduplicated count for nothing.
        compared: share of the documents in all these groups.
        largest_unit: text of the largest file, in bytes, where it is more than that of a unit of several files.

    Raises:
        RefusedInput: `tokens`, `kept`, `largest_group` or `compared` is out of its range.
    """
    if tokens <= 0:
        raise RefusedInput(f"tokens is {tokens}: must be positive")
    if not 0 < kept <= 1:
        raise RefusedInput(f"kept is {kept}: the share of the text that is kept lies above 0 and is at most 1")
    if not 0 <= largest_group <= 1:
        raise RefusedInput(f"largest_group is {largest_group}: a share of the documents is at least 0 and at most 1")
    if not largest_group <= compared <= 1:
        raise RefusedInput(f"compared is {compared}: a share from that of the largest group ({largest_group}) to 1")
    text = tokens * rates.text_bytes_per_token / kept
    documents = tokens / rates.tokens_per_document / kept
    signatures = documents * compared * rates.signature_bytes
    shards = math.ceil(tokens * TOKEN_BYTES / shard_bytes)
    hours_a_byte = (1 / rates.clean + kept / rates.tokenize) / 1e6 / 3600
    return DataPlan(
        documents=round(documents),
        text_bytes=round(text),
        clean_core_hours=text / 1e6 / rates.clean / 3600,
        tokenize_core_hours=text * kept / 1e6 / rates.tokenize / 3600,
        units=math.ceil(text / UNIT_TEXT_BYTES),
        longest_unit_hours=min(text, largest_unit) * hours_a_byte,
        cluster_hours=documents * largest_group / 1e6 * rates.cluster_seconds / 3600,
        cluster_memory_bytes=round(documents * largest_group * rates.cluster_bytes),
        shards=shards,
        files=shards + DOMAINS,
        shard_object_bytes=round(shard_bytes / TOKEN_BYTES * rates.shard_bytes_per_token),
        storage_bytes=round(tokens * rates.shard_bytes_per_token),
        peak_bytes=round(max(text / TEXT_COMPRESSION + signatures, tokens * rates.shard_bytes_per_token)),
        loader_cache_bytes=DOMAINS * SHARDS_HELD * shard_bytes,
    )
