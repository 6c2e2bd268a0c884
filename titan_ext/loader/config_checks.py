"""Checks of a StreamingLoader's configuration against the run and the shards, before any batch is made."""

import math
import tempfile
from collections.abc import Collection
from pathlib import Path

from torchtitan.components.tokenizer import BaseTokenizer

from core.errors import RefusedInput
from core.samples import VOCABULARY_KEY, hash_vocabulary
from titan_ext.loader.domain import Domain
from titan_ext.loader.shard_index import is_remote


def check_batch_shape(global_batch_size: int, dp_world_size: int, local_batch_size: int, seq_len: int) -> None:
    """Check the length of a sequence and the sizes of the batches.

    A sequence needs at least two tokens. The global batch must consist of whole micro-batches, the same number on every
    rank.

    Args:
        global_batch_size: number of sequences of an optimizer step over all ranks.
        dp_world_size: number of data-parallel ranks.
        local_batch_size: number of sequences of a micro-batch on one rank.
        seq_len: number of tokens of a sequence.

    Raises:
        RefusedInput: `seq_len` is below 2, or the global batch cannot be divided in this way.
    """
    if seq_len < 2:
        raise RefusedInput(f"seq_len is {seq_len}; a packed sequence has at least 2 tokens")
    step = dp_world_size * local_batch_size
    if local_batch_size < 1 or global_batch_size < 1 or global_batch_size % step:
        raise RefusedInput(
            f"global_batch_size is {global_batch_size}; it must be a positive multiple of dp_world_size "
            f"{dp_world_size} x local_batch_size {local_batch_size} = {step}"
        )


def check_cache(cache: Path, cache_bytes: int, shards: str) -> None:
    """Check that the folder `cache` may hold something, lies outside of `shards`, and can be written to.

    Raises:
        RefusedInput: `cache_bytes` is not positive, or the cache would be written into the source, or cannot be.
    """
    if cache_bytes < 1:
        raise RefusedInput(f"cache_bytes is {cache_bytes}; it must be positive, at least a few shards")
    if not is_remote(shards) and cache.resolve().is_relative_to(Path(shards).resolve()):
        raise RefusedInput(f"local ({cache}) lies in shards ({shards}), which is never written to: name another")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise RefusedInput(
            f"local ({cache}) is the cache for unpacked shards and cannot be written to ({error}): name another folder "
            "(a recipe's cluster.shard_cache.folder)"
        ) from error


def check_mixture(mixture: dict[str, float]) -> None:
    """Check that all shares are positive and sum to 1; an empty mixture is correct.

    Raises:
        RefusedInput: a share is not positive (NaN included), or the sum is more than 1e-6 away from 1.
    """
    bad = {name: share for name, share in mixture.items() if not share > 0}
    if bad:
        raise RefusedInput(f"mixture has shares that are not positive: {bad}; leave those domains out")
    total = math.fsum(mixture.values())
    if mixture and not abs(total - 1) <= 1e-6:
        raise RefusedInput(f"mixture sums to {total:.9g}, not to 1: {mixture}")


def check_domains(shards: str, mixture: dict[str, float], present: Collection[str]) -> None:
    """Check that there are domains to read, and that every domain of the mixture is one of them.

    Args:
        shards: folder or address of the stage.
        mixture: domain -> share; may be empty.
        present: domains in the folder. The content of an address cannot be listed, so the caller passes the domains of
            the mixture instead.

    Raises:
        RefusedInput: there are no domains, or the mixture names a domain that is not in `present`.
    """
    if is_remote(shards):
        if not mixture:
            raise RefusedInput(f"mixture is empty, and {shards} is no local folder whose domains could be listed")
    elif not present:
        raise RefusedInput(f"shards is {shards!r}, which has no folder with an index.json: is it a stage folder?")
    absent = sorted(set(mixture) - set(present))
    if absent:
        raise RefusedInput(f"mixture names {absent}, no MDS folders of {shards}; present: {present}")


def check_tokenizer(domains: list[Domain], tokenizer: BaseTokenizer | None) -> None:
    """Check that the shards' token ids mean the same as the tokenizer's.

    Ids of another tokenizer are valid numbers too: the model would train on wrong words without any error. Shards that
    state no vocabulary pass the check. Without a tokenizer all shards pass.

    Raises:
        RefusedInput: the shards state another vocabulary.
    """
    stated = {domain.name: domain.store.index.vocabulary for domain in domains if domain.store.index.vocabulary}
    if tokenizer is None or not stated:
        return
    given = hash_vocabulary(tokenizer.get_vocab())
    other = {name: vocabulary for name, vocabulary in stated.items() if vocabulary != given}
    if other:
        raise RefusedInput(
            f"the shards of {sorted(other)} were written with another tokenizer: {VOCABULARY_KEY} in their index.json "
            f"is {sorted(set(other.values()))}, that of the tokenizer given here {given}. Name the tokenizer folder of "
            "the data step as hf_assets_path, or write the shards again with this one"
        )
