"""The batches of a stage in plain Python, read from its shards: which documents come when, and where they stand.

Written from docs/streaming_loader.md, for global batches of at most 32 sequences: each lane is a section of its own.
"""

import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from streaming import Stream

from tests.titan_ext.stage_of_shards import load_stock_readers
from titan_ext.config import StageConfig

IGNORED = -100
PARTS = 4
"""Number of parts of a shard, which enter the order one slot after the other."""


@dataclass(frozen=True)
class Domain:
    """The documents of a folder of shards, as streaming reads them."""

    name: str
    share: float
    """Its share of the mixture."""
    sizes: list[int]
    """Number of documents of each shard."""
    shard_bytes: list[int]
    """Uncompressed bytes of each shard."""
    documents: dict[tuple[int, int], list[tuple[int, int]]]
    """(shard, number in it) -> the pairs of input and label, the label -100 where it is not trained."""
    whole: bool
    """Whether a document is a conversation, which is not cut."""

    @property
    def mean(self) -> float:
        """Return the mean number of tokens of a document, from bytes: 4 a token, and 1 for its mask."""
        return sum(self.shard_bytes) / sum(self.sizes) / (5 if self.whole else 4)


def read_domain(folder: Path, copy: Path, share: float) -> Domain:
    """Read a folder of shards through streaming's own readers; they unpack the shards into `copy`."""
    entries = json.loads((folder / "index.json").read_text())["shards"]
    stream = Stream(
        remote=str(folder),
        local=str(copy),
        validate_hash="xxh64",
        keep_zip=False,
        download_retry=1,
        download_timeout=10,
    )
    documents = {}
    for shard, reader in enumerate(load_stock_readers(stream)):
        stream.prepare_shard(reader)
        for number in range(len(reader)):
            sample = reader.get_item(number)
            tokens = sample["tokens"].tolist()
            trained = sample.get("loss_mask", np.ones(len(tokens))).tolist()
            labels = [token if on else IGNORED for token, on in zip(tokens[1:], trained[1:], strict=True)]
            documents[shard, number] = list(zip(tokens[:-1], labels, strict=True))
    sizes = [entry["samples"] for entry in entries]
    shard_bytes = [entry["raw_data"]["bytes"] for entry in entries]
    return Domain(folder.name, share, sizes, shard_bytes, documents, "loss_mask" in entries[0]["column_names"])


def order_documents(domain: Domain, seed: int, lane: int, lanes: int) -> Iterator[list[tuple[int, int]]]:
    """Yield a lane's documents of a domain, epoch after epoch."""
    for epoch in itertools.count():
        epoch_seed = (seed, zlib.crc32(domain.name.encode()), epoch)
        generator = np.random.default_rng(epoch_seed)
        shards = generator.permutation(len(domain.sizes)).tolist()
        number = (lane + int(generator.integers(lanes))) % lanes
        total = sum(domain.shard_bytes)
        slots: dict[int, list[tuple[int, int]]] = {}
        place = begin = 0
        for shard in shards:
            size, length = domain.sizes[shard], domain.shard_bytes[shard]
            low, high = (
                min(max((total * cut // lanes - begin) * size // length, 0), size) for cut in (number, number + 1)
            )
            begin += length
            if low == high:
                continue
            mixed = np.random.default_rng((*epoch_seed, number, 0, place)).permutation(np.arange(low, high)).tolist()
            for part in range(PARTS):
                taken = mixed[len(mixed) * part // PARTS : len(mixed) * (part + 1) // PARTS]
                # The newest shard of a slot comes first, so shards are put in front of those before them.
                slots[place + part] = [(shard, document) for document in taken] + slots.get(place + part, [])
            place += 1
        for slot, inside in sorted(slots.items()):
            order = np.random.default_rng((*epoch_seed, number, 1, slot)).permutation(len(inside))
            yield from (domain.documents[inside[i]] for i in order)


def begin_lanes(domains: list[Domain], lanes: int) -> list[list[float]]:
    """Return how many tokens each domain is behind its share when a lane begins, by lane, then by domain.

    The lanes begin at evenly spread points of one lane's run in which every document has the mean length.
    """
    cycle = max(domain.mean / domain.share for domain in domains)
    tokens, behind = [0.0] * len(domains), []
    while len(behind) < lanes:
        now = [domain.share * sum(tokens) - filled for domain, filled in zip(domains, tokens, strict=True)]
        chosen = now.index(max(now))
        tokens[chosen] += domains[chosen].mean
        while len(behind) < lanes and cycle * len(behind) / lanes < sum(tokens):
            behind.append(now)
    return behind


def fill_rows(
    domains: list[Domain], behind: list[float], orders: list[Iterator], seq_len: int, pad: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the sequences of one lane: triples of input, position and label, one token at a time."""
    tokens = [0] * len(domains)
    row: list[tuple[int, int, int]] = []
    while True:
        now = [d.share * sum(tokens) - t + b for d, t, b in zip(domains, tokens, behind, strict=True)]
        chosen = now.index(max(now))
        pairs = next(orders[chosen])
        if domains[chosen].whole:
            pairs = pairs[:seq_len]
        if all(label == IGNORED for _, label in pairs):
            continue
        if domains[chosen].whole and len(row) + len(pairs) > seq_len:
            yield row + [(pad, position, IGNORED) for position in range(seq_len - len(row))]
            row = []
        position = 0
        for token, label in pairs:
            row.append((token, position, label))
            position += 1
            if len(row) == seq_len:
                yield row
                row, position = [], 0
        tokens[chosen] += len(pairs)


def read_batches(stage: StageConfig, data: Path, copies: Path, *, seed: int, pad: int) -> Iterator[torch.Tensor]:
    """Yield the global batches of a stage, int64 [sequences, seq_len, 3]: input, position, label.

    Args:
        data: folder of the data step.
        copies: folder for unpacked shards.
    """
    lanes = stage.global_batch_size
    domains = [
        read_domain(data / "shards" / stage.shards / name, copies / name, share)
        for name, share in sorted(stage.mixture.items())
    ]
    rows = [
        fill_rows(
            domains, behind, [order_documents(domain, seed, lane, lanes) for domain in domains], stage.seq_len, pad
        )
        for lane, behind in enumerate(begin_lanes(domains, lanes))
    ]
    while True:
        yield torch.tensor([next(row) for row in rows])
