"""A memory-mapped copy of an MDS folder's index.json.

index.json stays the truth: mosaicml-streaming reads it. At the published size it lists 358,000 shards, and parsing it
in every rank takes a minute and 2 GB. The data step writes its columns beside it (core/shard_columns.py). Where these
are missing, the first process of a node that opens the folder writes them into the cache, in a folder named after
index.json's hash. All processes map the file: they share the memory, and read only the entries that they need.

Shape legend: S shards of the folder.
"""

import hashlib
import json
import operator
import os
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from core import atomic
from core.errors import OTHER_FORM, RefusedInput
from core.hashing import sha256_file
from core.samples import SHARD_HASH
from core.shard_columns import COLUMNS_FILE, FORMAT, NAMES, NUMBERS, build_columns, check_shard_name
from titan_ext.compat import download_file

CACHE_SUFFIX = ".shardcache"
"""Ending of the name of a domain's cache folder."""
TYPES: dict[str, str] = {name: f"<{np.dtype(code).str[1:]}" for name, code in NUMBERS.items()}
"""Column of numbers -> its numpy dtype."""
SETTLED_NANOSECONDS = 2 * 10**9
"""Age from which on a file's times tell that it has not changed: file systems count them in steps of up to a second."""


class ShardIndex:
    """The entries of index.json, without one Python object a shard.

    Attributes:
        fingerprint: first 16 hexadecimal digits of the SHA-256 of index.json.
        num_shards: S.
        samples: number of samples in each shard, int64 [S], memory-mapped.
        raw_bytes: uncompressed size of each shard in bytes, int64 [S], memory-mapped.
        is_compressed: whether a shard is compressed.
        column_names: names of a sample's columns; empty without shards.
        vocabulary: what `core.samples.VOCABULARY_KEY` says in index.json; None where it says nothing.
    """

    def __init__(self, path: Path, fingerprint: str):
        """Map the columns that `core.shard_columns` has written to `path`.

        Raises:
            OTHER_FORM, OSError: the file is missing or damaged, or was made of another index.json.
        """
        with path.open("rb") as file:
            line = file.readline()
            header = json.loads(line)
            crc = 0
            while block := file.read(1 << 20):
                crc = zlib.crc32(block, crc)
        if header["format"] != FORMAT or header["index_sha256"][:16] != fingerprint or header["crc32"] != crc:
            raise ValueError(f"{path} has changed, or was made of another index.json")
        self.fingerprint, self._path = fingerprint, path
        self.num_shards = operator.index(header["num_shards"])
        self._columns = {
            name: _map_column(path, len(line), self.num_shards, name, **place)
            for name, place in header["columns"].items()
        }
        self.samples: NDArray[np.int64] = self._columns["samples"]
        self.raw_bytes: NDArray[np.int64] = self._columns["raw_bytes"]
        missing = {*NUMBERS, *NAMES} - self._columns.keys()
        self._kinds: list[dict[str, Any]] = [{**kind} for kind in header["kinds"]]
        if missing or not all(isinstance(kind["column_names"], list) for kind in self._kinds):
            raise ValueError(f"{path} lacks columns, or names of a sample's")
        if self.num_shards and not self._columns["kind"].max() < len(self._kinds):
            raise ValueError(f"{path} names a kind of shard that it does not describe")
        self.is_compressed = header["is_compressed"] is True
        self.vocabulary: str | None = header["vocabulary"]
        self.column_names: list[str] = self._kinds[0]["column_names"] if self._kinds else []

    def raw_name(self, shard: int) -> str:
        """Return the name of the uncompressed file of a shard.

        Raises:
            RefusedInput: it is not a plain name, so the shard would be unpacked outside of the cache.
        """
        return self._check_name(self._columns["raw_name"][shard])

    def read_entry(self, shard: int) -> dict[str, Any]:
        """Return a shard's entry as in index.json, of whose hashes only SHARD_HASH is kept."""
        entry = {**self._kinds[self._columns["kind"][shard]], "samples": int(self.samples[shard])}
        return entry | {"raw_data": self._read_file(shard, "raw"), "zip_data": self._read_file(shard, "zip")}

    def _check_name(self, name: bytes) -> str:
        text = os.fsdecode(name)  # what is no UTF-8 is refused below
        check_shard_name(text, str(self._path.parent))
        return text

    def _read_file(self, shard: int, part: str) -> dict[str, Any] | None:
        name, size, digest = (self._columns[f"{part}_{column}"][shard] for column in ("name", "bytes", "hash"))
        if not name:
            return None
        return {
            "basename": self._check_name(name),
            "bytes": int(size),
            "hashes": {SHARD_HASH: f"{int(digest):016x}"},
        }


def _map_column(path: Path, begin: int, num_shards: int, name: str, *, offset: int, width: int) -> NDArray[Any]:
    """Map one column of the file; an empty one cannot be mapped."""
    dtype = np.dtype(TYPES.get(name, f"S{width}"))
    if not num_shards:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", begin + offset, (num_shards,))


def is_remote(source: str) -> bool:
    """Return whether `source` is an address (s3://, gs://, hf://, ...) and not a path of this machine."""
    return bool(urlparse(source).scheme)


def name_cache_folder(cache: Path, domain: str, fingerprint: str) -> Path:
    """Return the folder below `cache` for the shards of a domain whose index.json has this fingerprint."""
    return cache / f"{domain}-{fingerprint}{CACHE_SUFFIX}"


def open_index(source: str, cache: Path, domain: str) -> ShardIndex:
    """Return the mapped index of a domain's folder.

    index.json is read as it is at the source now: a cached copy may belong to an older data set.

    Args:
        source: folder or address of the shards.
        cache: the cache folder; the index lies below `name_cache_folder`.

    Raises:
        RefusedInput: index.json is missing, damaged, or describes other data than tokens.
        OSError: the disk of `cache` is full.
    """
    if not is_remote(source):
        path = Path(source) / "index.json"
        if not path.is_file():
            raise RefusedInput(f"{path} is missing: a domain is a folder written by MDSWriter")
        return _open_columns(source, path, cache, domain, _remember_hash(path, cache))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.json"
        try:
            download_file(f"{source}/index.json", path)
        except Exception as error:  # each store's client has exception types of its own
            raise RefusedInput(
                f"{source}/index.json is missing or out of reach ({type(error).__name__}: {error}): a domain is a "
                "folder written by MDSWriter; check the address and the credentials"
            ) from error
        return _open_columns(source, path, cache, domain, sha256_file(path))


def _remember_hash(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a local file, from the cache if the file is the one that was hashed before.

    It is the same file while its inode, size and times are the same. The file of hundreds of megabytes would else be
    read by every rank at every start.
    """
    stat = path.stat()
    address = str(path.resolve())
    identity = [address, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    record = cache / "index-hashes" / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(record.read_text())
        if known["identity"] == identity:
            return known["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never hashed before, or a damaged record, which is replaced
    digest = sha256_file(path)
    if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NANOSECONDS:
        atomic.write_json(record, {"identity": identity, "sha256": digest})
    return digest


def _open_columns(source: str, path: Path, cache: Path, domain: str, sha256: str) -> ShardIndex:
    """Return the mapped index of `path`: of the columns beside it, or of those in the cache.

    The first process of a machine that finds neither makes the latter.

    Args:
        sha256: hash of the file at `path`.
    """
    fingerprint = sha256[:16]
    beside = path.with_name(COLUMNS_FILE)
    if beside.is_file() and (index := _try_columns(beside, fingerprint)) is not None:
        return index
    cached = name_cache_folder(cache, domain, fingerprint) / COLUMNS_FILE
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cached.with_name(".lock-index")):
        if (index := _try_columns(cached, fingerprint)) is None:
            atomic.write_bytes(cached, build_columns(path.read_bytes(), sha256, source))
            index = ShardIndex(cached, fingerprint)
        return index


def _try_columns(path: Path, fingerprint: str) -> ShardIndex | None:
    """Return the mapped index, or None where the file is not there, damaged, or of another index.json."""
    try:
        return ShardIndex(path, fingerprint)
    except (OSError, *OTHER_FORM):
        return None
