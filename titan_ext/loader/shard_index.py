"""A memory-mapped copy of an MDS folder's index.json, made once a node.

index.json stays the truth: mosaicml-streaming reads it, and nothing is ever written beside it. At the published size it
lists 358,000 shards. Parsing it in every rank takes a minute and 2 GB. So the first process of a node that opens the
folder parses index.json and writes its columns into the cache, in a folder named after index.json's hash. The others
map these files: they share the memory, and read only the entries that they need.

Shape legend: S shards of the folder.
"""

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import xxhash
from filelock import FileLock
from numpy.typing import NDArray

from core import atomic
from core.errors import RefusedInput
from core.hashing import sha256_file
from core.samples import SFT_COLUMNS, SHARD_HASH, VOCABULARY_KEY
from titan_ext.compat import download_file

CACHE_SUFFIX = ".shardcache"
"""Ending of the name of a domain's cache folder."""
FORMAT = 1
"""Number in the name of the folder of columns. It changes with the columns."""
COLUMNS: dict[str, type[np.generic]] = {
    "samples": np.int64, "kind": np.uint32,
    "raw_name": np.bytes_, "raw_bytes": np.int64, "raw_hash": np.uint64,
    "zip_name": np.bytes_, "zip_bytes": np.int64, "zip_hash": np.uint64,
}  # fmt: skip
"""Name of a column -> its type. Hashes are SHARD_HASH; a shard without a compressed file has an empty zip_name; `kind`
numbers the distinct rests of the entries."""
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

    def __init__(self, folder: Path, fingerprint: str):
        """Map the columns that `_write_columns` has written to `folder`.

        Raises:
            ValueError, OSError: a file is missing or damaged.
        """
        common = json.loads((folder / "common.json").read_text())
        for name in COLUMNS:
            if _hash_file(folder / f"{name}.npy") != common["xxh64"][name]:
                raise ValueError(f"{folder / name}.npy has changed")
        self.fingerprint = fingerprint
        self.num_shards: int = common["num_shards"]
        self._columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        self.samples: NDArray[np.int64] = self._columns["samples"]
        self.raw_bytes: NDArray[np.int64] = self._columns["raw_bytes"]
        self._kinds: list[dict[str, Any]] = common["kinds"]
        self.is_compressed: bool = common["is_compressed"]
        self.vocabulary: str | None = common["vocabulary"]
        self.column_names: list[str] = self._kinds[0]["column_names"] if self._kinds else []

    def raw_name(self, shard: int) -> str:
        """Return the name of the uncompressed file of a shard."""
        return self._columns["raw_name"][shard].decode()

    def read_entry(self, shard: int) -> dict[str, Any]:
        """Return a shard's entry as in index.json, of whose hashes only SHARD_HASH is kept."""
        entry = {**self._kinds[self._columns["kind"][shard]], "samples": int(self.samples[shard])}
        return entry | {"raw_data": self._read_file(shard, "raw"), "zip_data": self._read_file(shard, "zip")}

    def _read_file(self, shard: int, part: str) -> dict[str, Any] | None:
        name, size, digest = (self._columns[f"{part}_{column}"][shard] for column in ("name", "bytes", "hash"))
        if not name:
            return None
        return {"basename": name.decode(), "bytes": int(size), "hashes": {SHARD_HASH: f"{int(digest):016x}"}}


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
        return _open_columns(source, path, cache, domain, _remember_hash(path, cache)[:16])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.json"
        try:
            download_file(f"{source}/index.json", path)
        except Exception as error:  # each store's client has exception types of its own
            raise RefusedInput(
                f"{source}/index.json is missing or out of reach ({type(error).__name__}: {error}): a domain is a "
                "folder written by MDSWriter; check the address and the credentials"
            ) from error
        return _open_columns(source, path, cache, domain, sha256_file(path)[:16])


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


def _open_columns(source: str, path: Path, cache: Path, domain: str, fingerprint: str) -> ShardIndex:
    """Return the mapped index of `path`. The first process of a machine that asks for it makes it."""
    folder = name_cache_folder(cache, domain, fingerprint) / f"index-{FORMAT}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(".lock-index")):
        try:
            return ShardIndex(folder, fingerprint)
        except (OSError, ValueError, KeyError):
            pass  # not there yet, or damaged: made below from index.json
        atomic.remove(folder)
        with atomic.atomic_write(folder) as partial:
            _write_columns(partial, *_parse_index(source, path))
        return ShardIndex(folder, fingerprint)


def _parse_index(source: str, path: Path) -> tuple[dict[str, list], list[dict[str, Any]], str | None]:
    """Return the columns of index.json, the distinct rests of its entries, and its vocabulary."""
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    kinds: dict[str, int] = {}

    def take_shard(value: dict[str, Any]) -> dict[str, Any] | None:
        # The parser calls this for every object as soon as it is read. So the entries never exist all at once.
        if "raw_data" not in value:
            return value
        _check_shard(source, value)
        for part in ("raw", "zip"):
            file = value.pop(f"{part}_data") or {"basename": "", "bytes": 0, "hashes": {SHARD_HASH: "0" * 16}}
            columns[f"{part}_name"].append(file["basename"].encode())
            columns[f"{part}_bytes"].append(file["bytes"])
            columns[f"{part}_hash"].append(int(file["hashes"][SHARD_HASH], 16))
        columns["samples"].append(value.pop("samples"))
        columns["kind"].append(kinds.setdefault(json.dumps(value, sort_keys=True), len(kinds)))
        return None

    try:
        index = json.loads(path.read_bytes(), object_hook=take_shard)
        if index["version"] != 2 or any(entry is not None for entry in index["shards"]):
            raise ValueError("it is not of MDS version 2")
    except RefusedInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedInput(f"{source}/index.json is damaged ({error!r}): write the shards again") from error
    return columns, [json.loads(kind) for kind in kinds], index.get(VOCABULARY_KEY)


def _check_shard(source: str, shard: dict) -> None:
    if shard["samples"] < 0 or shard["raw_data"]["bytes"] < 1:
        raise RefusedInput(
            f"{source}/index.json is damaged: a shard of {shard['samples']} samples and {shard['raw_data']['bytes']} "
            "bytes; write the shards again"
        )
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if "tokens" not in columns or any(SFT_COLUMNS.get(name) != encoding for name, encoding in columns.items()):
        raise RefusedInput(
            f"{source}: samples have the columns {columns}, not {SFT_COLUMNS} (loss_mask for conversations only)"
        )
    if any(SHARD_HASH not in file["hashes"] for file in (shard["raw_data"], shard["zip_data"]) if file):
        raise RefusedInput(
            f"{source}: index.json has no {SHARD_HASH} of its shards; write them with hashes=['{SHARD_HASH}']"
        )


def _write_columns(folder: Path, columns: dict[str, list], kinds: list[dict[str, Any]], vocabulary: str | None) -> None:
    """Write each column as a .npy file, and what is not of one shard as common.json."""
    folder.mkdir()
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", np.array(values, COLUMNS[name]))
    common = {
        "num_shards": len(columns["samples"]),
        "is_compressed": any(columns["zip_name"]),
        "kinds": kinds,
        "vocabulary": vocabulary,
        "xxh64": {name: _hash_file(folder / f"{name}.npy") for name in columns},
    }
    (folder / "common.json").write_text(json.dumps(common))


def _hash_file(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
