"""The shards of one MDS folder, local or remote: fetched ahead, unpacked in a cache, hashed before their first use.

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
import errno
import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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

from core.errors import RefusedInput

log = logging.getLogger(__name__)

HASH = "xxh64"
COLUMNS = {"tokens": "ndarray:uint32", "loss_mask": "ndarray:uint8"}
VOCABULARY_KEY = "vocabulary_sha256"
"""Key of index.json: what the token ids mean (`vocabulary_sha256` of streaming_loader)."""
CACHE_SUFFIX = ".shardcache"
NUM_LOCKS = 64
NUM_WORKERS = 4
"""Threads of a process that fetch, unpack and hash shards ahead of the loader, over all its domains."""
DOWNLOAD_SECONDS = 600
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardStore:
    """Samples of one MDS folder by shard and index.

    `source` is a folder or an address streaming can download from; `cache` is where unpacked shards live, those longest
    unused dropped beyond `cache_bytes`. Raises RefusedInput for a folder that cannot be trained on: no index.json, not
    the sample schema {tokens: uint32[, loss_mask: uint8]}, no hashes.

    Attributes:
        fingerprint: hash of index.json.
        vocabulary: what index.json says its token ids mean; None where it does not say.
        sizes: int64 [S], samples a shard.
        num_bytes: uncompressed size of all shards.
    """

    def __init__(self, name: str, source: str, cache: Path, cache_bytes: int):
        self.source = source
        self._cache, self._cache_bytes = cache, cache_bytes
        content = _read_index(source)
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        index = _parse_index(source, content)
        self.vocabulary = index.get(VOCABULARY_KEY)
        self._in_place = not is_remote(source) and not any(shard["zip_data"] for shard in index["shards"])
        if self._in_place:
            self._local = source
        else:
            self._local = str(cache / f"{name}-{self.fingerprint}{CACHE_SUFFIX}")
            _write_whole(Path(self._local) / "index.json", content)
        self._streams = threading.local()
        # A world of one: the index is in place, so no process has to wait for another.
        self._readers: list[MDSReader] = self._stream().get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)
        self.sizes: NDArray[np.int64] = np.array([reader.samples for reader in self._readers], np.int64)
        self.num_bytes = sum(reader.raw_data.bytes for reader in self._readers)
        self._verified: set[int] = set()
        self._locks = [threading.Lock() for _ in range(NUM_LOCKS)]

    @property
    def column_names(self) -> list[str]:
        """`tokens`, and `loss_mask` for conversations."""
        return self._readers[0].column_names

    def path(self, shard: int) -> Path:
        """Where the raw shard lies, or will."""
        return Path(self._local) / self._readers[shard].raw_data.basename

    def read(self, shard: int, index: int) -> dict:
        """Sample `index` of a shard; ValueError where the shard is damaged and cannot be fetched again."""
        while True:
            try:
                self._prepare(shard)
                return self._readers[shard].get_item(index)
            except FileNotFoundError:  # this or another process made room in the cache since: fetch it again
                self._verified.discard(shard)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Have the shards prepared by the process's workers, unless the cache is too small to hold them for long."""
        shards = [shard for shard in shards if shard not in self._verified]
        if 4 * sum(self._readers[shard].raw_data.bytes for shard in shards) <= self._cache_bytes:
            for shard in shards:
                _workers().submit(self._prepare_ahead, shard)

    def _prepare_ahead(self, shard: int) -> None:
        if _is_ending():
            return
        try:
            self._prepare(shard)
        except Exception as error:
            # It shows again, and is raised, when the shard is read.
            log.warning("a shard could not be fetched ahead: %s", error)

    def _stream(self) -> Stream:
        """This thread's: its downloader is not made for several."""
        if not hasattr(self._streams, "stream"):
            self._streams.stream = Stream(
                remote=None if self._in_place else self.source,
                local=self._local,
                download_retry=2,
                download_timeout=DOWNLOAD_SECONDS,
                validate_hash=HASH,
                keep_zip=False,
            )
        return self._streams.stream

    def _prepare(self, shard: int) -> None:
        """Have the raw shard in place, its hash checked in this process."""
        with self._locks[shard % NUM_LOCKS]:
            if shard in self._verified:
                return
            if _is_ending():
                raise RuntimeError(f"shard {self.path(shard)} is not prepared: the process is ending")
            if not self._is_intact(shard):
                if self._in_place:
                    raise RefusedInput(
                        f"shard {self.path(shard)} is damaged or missing: its {HASH} is not the one in index.json. "
                        "Restore the file from where it was written, or run the data step again"
                    )
                self._fetch(shard)
            if not self._in_place:
                os.utime(self.path(shard))  # recently used: last to be dropped
            self._verified.add(shard)

    def _fetch(self, shard: int) -> None:
        reader, path = self._readers[shard], self.path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if self._is_intact(shard):  # another process was first
                return
            _make_room(self._cache, self._cache_bytes - reader.raw_data.bytes, keep=path)
            # streaming trusts what is there, also what a killed process left: begin with nothing.
            files = [path, *([path.with_name(reader.zip_data.basename)] if reader.zip_data else [])]
            leftovers = [*files, *(file.with_name(f"{file.name}.tmp") for file in files)]
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)
            try:
                self._stream().prepare_shard(reader)
            except Exception as error:  # every store has exceptions of its own
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)
                raise self._explain(shard, error) from error
            if not self._is_intact(shard):
                raise RefusedInput(f"shard {path} does not have the {HASH} that {self.source}/index.json states")

    def _explain(self, shard: int, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return _no_room(self.path(shard), error)
        file = self._readers[shard].zip_data or self._readers[shard].raw_data
        return ValueError(
            f"shard {self.source}/{file.basename} is damaged, missing or out of reach at its source "
            f"({type(error).__name__}: {error}). Restore the file, or run the data step again"
        )

    def _is_intact(self, shard: int) -> bool:
        try:
            data = self.path(shard).read_bytes()
        except FileNotFoundError:
            return False
        reader = self._readers[shard]
        # An MDS file begins with its number of samples, which also shows an index that counts others.
        counted = int.from_bytes(data[:4], "little") == reader.samples
        return counted and xxhash.xxh64(data).hexdigest() == reader.raw_data.hashes[HASH]


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """The process's threads that prepare shards ahead.

    Not daemons: the interpreter would cut those off within native code, which can abort the process. It waits for an
    executor's threads, and `_is_ending` keeps that short: the shards they are at and no further one.
    """
    return ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="shard-worker")


def _is_ending() -> bool:
    """Whether the program has come to its end and only its threads are left."""
    return not threading.main_thread().is_alive()


def is_remote(source: str) -> bool:
    """Whether `source` is an address (s3://, gs://, hf://, ...) and not a path of this machine."""
    return bool(urlparse(source).scheme)


def default_cache() -> Path:
    """Where unpacked shards go unless a folder is named: the user's part of the machine's temporary directory."""
    return Path(tempfile.gettempdir()) / f"mobilemoe-shards-{os.getuid()}"


def _read_index(source: str) -> bytes:
    """index.json as it is at the source now; never a cached one, which may belong to an older data set."""
    if not is_remote(source):
        path = Path(source) / "index.json"
        if not path.is_file():
            raise RefusedInput(f"{path} is missing: a domain is a folder written by MDSWriter")
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "index.json"
        try:
            CloudDownloader.direct_download(f"{source}/index.json", str(local))
        except Exception as error:  # every store has exceptions of its own
            raise RefusedInput(
                f"{source}/index.json is missing or out of reach ({type(error).__name__}: {error}): a domain is a "
                "folder written by MDSWriter; check the address and the credentials"
            ) from error
        return local.read_bytes()


def _parse_index(source: str, content: bytes) -> dict:
    try:
        index = json.loads(content)
        for shard in index["shards"]:
            _check_shard(source, shard)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise RefusedInput(f"{source}/index.json is damaged ({error!r}): write the shards again") from error
    return index


def _check_shard(source: str, shard: dict) -> None:
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if "tokens" not in columns or any(COLUMNS.get(name) != encoding for name, encoding in columns.items()):
        raise RefusedInput(
            f"{source}: samples have the columns {columns}, not {COLUMNS} (loss_mask for conversations only)"
        )
    if any(HASH not in file["hashes"] for file in (shard["raw_data"], shard["zip_data"]) if file):
        raise RefusedInput(f"{source}: index.json has no {HASH} of its shards; write them with hashes=['{HASH}']")


def _write_whole(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or the file of before, also with several writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_bytes() == data:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".index-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
        except OSError as error:
            Path(file.name).unlink()
            raise _no_room(path, error) from error
    os.replace(file.name, path)


def _no_room(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno, f"cannot write {path} ({error}). Make room there, or name another folder as the loader's `local`"
    )


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
