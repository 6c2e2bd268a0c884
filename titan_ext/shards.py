"""One domain of a stage: an MDS folder read by verified shard, its documents in a shuffled order without end.

Shard files, download and decompression are mosaicml-streaming's (`Stream`, `MDSReader`); `StreamingDataset` is not
used, so there is no shared memory a killed run could leave behind. What streaming leaves open is closed here:

- It validates a shard only while fetching it. Here every raw shard is hashed against index.json before its first use
  in a process, and a bad copy in the cache is fetched again.
- It decompresses beside the source. Here compressed shards are unpacked in a cache folder named after the index's
  hash, so a source is never written to, two data sets never mix, and the processes of a machine share one copy (and
  one page cache).
- Its cache takes no account of processes that prepare the same shard at once: here they take a file lock, which also
  keeps others from making room with a shard that is being fetched.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.mds import MDSReader
from streaming.base.storage import CloudDownloader
from streaming.base.world import World

HASH = "xxh64"
SHUFFLE_SHARDS = 16
"""Shards whose documents are shuffled among each other; bounds the shards in use and the memory of the order."""
CACHED_GROUPS = 32
COLUMNS = {"tokens": "ndarray:uint32", "loss_mask": "ndarray:uint8"}
CACHE_SUFFIX = ".shardcache"
NUM_LOCKS = 64


@dataclass(frozen=True)
class Document:
    """`tokens` uint32 [n]; `loss_mask` uint8 [n] marks a conversation (None: plain text), 1 where a token is a
    target.
    """

    tokens: NDArray[np.uint32]
    loss_mask: NDArray[np.uint8] | None

    @property
    def num_pairs(self) -> int:
        """(input, label) pairs: a document of n tokens has n - 1."""
        return max(len(self.tokens) - 1, 0)


class EpochOrder:
    """A permutation of one epoch's documents: shards in random order, documents shuffled within groups of shards.

    Groups are permuted when first asked for. streaming's own shuffles build the whole epoch's permutation instead,
    which takes 0.26 s and tens of bytes a million documents: 25 minutes and 48 GB a process at the paper's six
    billion.
    """

    def __init__(self, shard_sizes: NDArray[np.int64], seed: tuple[int, ...]):
        """`shard_sizes` int64 [S], documents a shard; `seed` fixes the order."""
        self._sizes = shard_sizes
        self._seed = seed
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes)])
        self._shards = np.random.default_rng(seed).permutation(len(shard_sizes))
        group_sizes = np.add.reduceat(shard_sizes[self._shards], np.arange(0, len(shard_sizes), SHUFFLE_SHARDS))
        self._group_starts = np.concatenate([[0], np.cumsum(group_sizes)])
        self._groups: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index within the shard) of the document at `position` of this epoch."""
        group = bisect_right(self._group_starts, position) - 1
        document = self._group(group)[position - self._group_starts[group]]
        shard = bisect_right(self._starts, document) - 1
        return shard, int(document - self._starts[shard])

    def _group(self, group: int) -> NDArray[np.int64]:
        """Documents of a group in their order; the groups asked for last are kept."""
        if group not in self._groups:
            self._groups[group] = self._permute(group)
        self._groups.move_to_end(group)
        if len(self._groups) > CACHED_GROUPS:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _permute(self, group: int) -> NDArray[np.int64]:
        shards = self._shards[group * SHUFFLE_SHARDS : (group + 1) * SHUFFLE_SHARDS]
        documents = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in shards])
        return np.random.default_rng((*self._seed, group)).permutation(documents)


class Domain:
    """The documents of one MDS folder, numbered through all epochs.

    `source` is a folder or an address streaming can download from; `cache` is where unpacked shards live, oldest
    dropped beyond `cache_bytes`. Raises ValueError for a folder that cannot be trained on: no index.json, not the
    sample schema {tokens: uint32[, loss_mask: uint8]}, no hashes, no document.
    """

    def __init__(self, name: str, source: str, cache: Path, *, seed: int, cache_bytes: int):
        self.name = name
        self.source = source
        self._cache, self._cache_bytes = cache, cache_bytes
        index = _read_index(source)
        self.fingerprint = hashlib.sha256(index).hexdigest()[:16]
        self._stream, self._readers = self._open(index)
        sizes = np.array([reader.samples for reader in self._readers], np.int64)
        self.num_documents = int(sizes.sum())
        if self.num_documents == 0:
            raise ValueError(f"domain {name!r} ({source}) has no documents: leave it out of the mixture")
        self._verified: set[int] = set()
        # The name is part of the seed: adding a domain leaves the order of the others as it is.
        make_order = partial(_epoch_order, sizes, seed, zlib.crc32(name.encode()))
        self._order: Callable[[int], EpochOrder] = lru_cache(maxsize=8)(make_order)

    @property
    def num_bytes(self) -> int:
        """Uncompressed size of all shards."""
        return sum(reader.raw_data.bytes for reader in self._readers)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a document on average, from the sizes in the index: 4 bytes a token and 1 for its loss mask."""
        return self.num_bytes / self.num_documents / (5 if "loss_mask" in self._readers[0].column_names else 4)

    def document(self, number: int) -> Document:
        """The `number`-th document of the domain's epochs laid end to end, each a permutation of all documents.

        Raises ValueError where the shard is damaged and cannot be fetched again, or a loss mask has another length.
        """
        epoch, position = divmod(number, self.num_documents)
        shard, index = self._order(epoch).locate(position)
        sample = self._read(shard, index)
        document = Document(sample["tokens"], sample.get("loss_mask"))
        if document.loss_mask is not None and len(document.loss_mask) != len(document.tokens):
            raise ValueError(
                f"sample {index} of {self._path(shard)} has {len(document.tokens)} tokens but a loss_mask of "
                f"{len(document.loss_mask)}; they must be equally long: write the shards again"
            )
        return document

    def _read(self, shard: int, index: int) -> dict:
        while True:
            try:
                self._prepare(shard)
                return self._readers[shard].get_item(index)
            except FileNotFoundError:  # this or another process made room in the cache since: fetch it again
                self._verified.discard(shard)

    def _open(self, index: bytes) -> tuple[Stream, list[MDSReader]]:
        try:
            shards = json.loads(index)["shards"]
            self._in_place = not is_remote(self.source) and not any(shard["zip_data"] for shard in shards)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.source}/index.json is damaged ({error}): write the shards again") from error
        for shard in shards:
            _check_shard(self.source, shard)
        if self._in_place:
            local = self.source
        else:
            local = str(self._cache / f"{self.name}-{self.fingerprint}{CACHE_SUFFIX}")
            _write_whole(Path(local) / "index.json", index)
        stream = Stream(
            remote=None if self._in_place else self.source,
            local=local,
            download_retry=2,
            download_timeout=600,
            validate_hash=HASH,
            keep_zip=False,
        )
        # A world of one: the index is in place, so no process has to wait for another.
        return stream, stream.get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)

    def _path(self, shard: int) -> Path:
        return Path(self._stream.local) / self._readers[shard].raw_data.basename

    def _prepare(self, shard: int) -> None:
        """Have the raw shard in place, its hash checked in this process."""
        if shard in self._verified:
            return
        if not self._is_intact(shard):
            if self._in_place:
                raise ValueError(
                    f"shard {self._path(shard)} is damaged or missing: its {HASH} is not the one in index.json. "
                    "Restore the file from where it was written, or run the data step again"
                )
            self._fetch(shard)
        if not self._in_place:
            os.utime(self._path(shard))  # recently used: last to be dropped
        self._verified.add(shard)

    def _fetch(self, shard: int) -> None:
        reader, path = self._readers[shard], self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if self._is_intact(shard):  # another process was first
                return
            _make_room(self._cache, self._cache_bytes - reader.raw_data.bytes, keep=path)
            # streaming trusts what is there, also what a killed process left: begin with nothing.
            path.unlink(missing_ok=True)
            if reader.zip_data:
                (path.parent / reader.zip_data.basename).unlink(missing_ok=True)
            try:
                self._stream.prepare_shard(reader)
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(
                    f"shard {self.source}/{(reader.zip_data or reader.raw_data).basename} is damaged or missing at its "
                    f"source ({error}). Restore the file, or run the data step again"
                ) from error
            if not self._is_intact(shard):
                raise ValueError(f"shard {path} does not have the {HASH} that {self.source}/index.json states")

    def _is_intact(self, shard: int) -> bool:
        try:
            data = self._path(shard).read_bytes()
        except FileNotFoundError:
            return False
        return xxhash.xxh64(data).hexdigest() == self._readers[shard].raw_data.hashes[HASH]


def is_remote(source: str) -> bool:
    """Whether `source` is an address (s3://, gs://, hf://, ...) and not a path of this machine."""
    return bool(urlparse(source).scheme)


def list_domains(shards: str) -> list[str]:
    """Names of the MDS folders directly under the stage folder `shards` (a local path), sorted."""
    return sorted(path.parent.name for path in Path(shards).glob("*/index.json"))


def default_cache() -> Path:
    """Where unpacked shards go unless a folder is named: the user's part of the machine's temporary directory."""
    return Path(tempfile.gettempdir()) / f"mobilemoe-shards-{os.getuid()}"


def _epoch_order(sizes: NDArray[np.int64], seed: int, domain: int, epoch: int) -> EpochOrder:
    return EpochOrder(sizes, (seed, domain, epoch))


def _read_index(source: str) -> bytes:
    """index.json as it is at the source now; never a cached one, which may belong to an older data set."""
    if not is_remote(source):
        path = Path(source) / "index.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: a domain is a folder written by MDSWriter")
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "index.json"
        try:
            CloudDownloader.direct_download(f"{source}/index.json", str(local))
        except FileNotFoundError as error:
            raise ValueError(f"{source}/index.json is missing: a domain is a folder written by MDSWriter") from error
        return local.read_bytes()


def _check_shard(source: str, shard: dict) -> None:
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if "tokens" not in columns or any(COLUMNS.get(name) != encoding for name, encoding in columns.items()):
        raise ValueError(
            f"{source}: samples have the columns {columns}, not {COLUMNS} (loss_mask for conversations only)"
        )
    if any(HASH not in file["hashes"] for file in (shard["raw_data"], shard["zip_data"]) if file):
        raise ValueError(f"{source}: index.json has no {HASH} of its shards; write them with hashes=['{HASH}']")


def _write_whole(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or the file of before, also with several writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".index-", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _make_room(cache: Path, limit: int, keep: Path) -> None:
    """Delete the raw shards longest unused until `limit` bytes are left. A reader that loses one fetches it again."""
    files = []
    for path in cache.glob(f"*{CACHE_SUFFIX}/*.mds"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process is making room too
            continue
        files.append((stat.st_mtime_ns, stat.st_size, path))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        if path == keep:
            continue
        with contextlib.suppress(Timeout), _lock(path, timeout=0):  # locked: another process is fetching it
            path.unlink(missing_ok=True)
            excess -= size


def _lock(path: Path, timeout: float = -1) -> FileLock:
    """Held by whoever writes or deletes the shard at `path`; a few lock files serve all shards of a folder."""
    return FileLock(path.parent / f".lock-{zlib.crc32(path.name.encode()) % NUM_LOCKS}", timeout=timeout)
