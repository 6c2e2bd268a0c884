"""This module reads the shards of one MDS folder, local or remote.

Shards are fetched ahead, decompressed into a cache, and hashed before their first use.

mosaicml-streaming's `Stream` and `MDSReader` download, decompress and read the shards. Its `StreamingDataset` is not
used, because it keeps state in shared memory that a killed run leaves behind. This module adds three things:

- streaming validates a shard only while it fetches it. This module hashes every raw shard against index.json before
  its first use in a process, and fetches a damaged copy in the cache again.
- streaming decompresses a shard beside its source. This module decompresses into a cache folder named after the
  index's hash. So it never writes to a source, two data sets never mix in one folder, and all processes of a machine
  share one copy (and one page cache).
- streaming does not expect two processes to prepare the same shard at the same time. Here they take a file lock. The
  lock also keeps other processes from deleting a shard that is being fetched.

It imports no torchtitan, so that a program that only reads shards starts fast.
"""

import contextlib
import errno
import functools
import logging
import os
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from streaming import Stream

from core.cache import find_shared_temporary, make_private_folder
from core.errors import DamagedData, report_damage
from core.samples import SHARD_HASH, SHARDS_AT
from titan_ext.compat import make_shard_reader
from titan_ext.loader.shard_index import CACHE_SUFFIX, is_remote, name_cache_folder, open_index

if TYPE_CHECKING:
    from streaming.base.format.mds import MDSReader

log = logging.getLogger(__name__)

NUM_LOCKS = 64
"""Number of thread locks of a store, and of lock files in a cache folder. Several shards share one lock."""
NUM_WORKERS = 4
"""Number of threads in a process that prepare shards ahead of the loader, over all its domains."""
DOWNLOAD_TIMEOUT = 600
"""Time limit for the download of one shard, in seconds."""
OPEN_READERS = 1024
"""Number of shards whose reader is kept in memory: more than the sections of a process use at the same time."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardStore:
    """Reads the samples of one MDS folder by shard and index.

    Attributes:
        source: folder or address of the shards.
        index: the entries of index.json (`shard_index.ShardIndex`).
        is_in_place: whether the shards are read at their source, and not from the cache.
    """

    def __init__(self, name: str, source: str, cache: Path, cache_bytes: int):
        """Open the folder's index.

        Args:
            name: name of the domain; it begins the name of its cache folder.
            source: a folder, or an address that streaming can download from. A folder may hold the index alone, and
                say where the shards are (`core.samples.SHARDS_AT`).
            cache: folder for decompressed shards and for the mapped index; several processes may share it.
                Uncompressed local shards are read in place.
            cache_bytes: limit for the raw shards in `cache`, in bytes. The shards not used for the longest time are
                deleted first. While shards are being fetched the cache may hold more, by their size at most.

        Raises:
            RefusedInput: the folder cannot be read as training data: it has no index.json, other columns than
                {tokens: uint32[, loss_mask: uint8]}, or no hashes.
            OSError: the disk of `cache` is full.
        """
        self.source = source
        self._cache, self._cache_bytes = cache, cache_bytes
        try:
            self.index = open_index(source, cache, name)
        except OSError as error:
            raise (_explain_full_disk(cache, error) if error.errno in DISK_FULL_ERRNOS else error) from error
        self._shards_at = _find_shards(source)
        stays = self._shards_at == source and not is_remote(source)
        self.is_in_place = stays and not self.index.is_compressed
        self._local = source if self.is_in_place else str(name_cache_folder(cache, name, self.index.fingerprint))
        self._streams = threading.local()
        self._reader = functools.lru_cache(maxsize=OPEN_READERS)(self._make_reader)
        self._verified: set[int] = set()
        self._locks = [threading.Lock() for _ in range(NUM_LOCKS)]

    def path(self, shard: int) -> Path:
        """Return the path of the raw shard; the file need not be there yet."""
        return Path(self._local) / self.index.raw_name(shard)

    def read(self, shard: int, index: int) -> dict[str, NDArray]:
        """Return one sample, by column: `tokens` uint32 [n] and, for conversations, `loss_mask` uint8 [n].

        Raises:
            DamagedData: the shard is damaged or missing and cannot be fetched again.
            OSError: the disk of the cache is full.
        """
        while True:
            try:
                self._prepare(shard)
                with report_damage(self.path(shard), "its hash is right, so it was written so: write the shards again"):
                    return _take_arrays(self._reader(shard).get_item(index))
            except FileNotFoundError:
                # This or another process has deleted the shard to stay within `cache_bytes`: fetch it again.
                self._verified.discard(shard)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to prepare the shards in the worker threads."""
        for shard in shards:
            # It may have been used in an earlier epoch, and deleted since.
            if shard not in self._verified or not self.path(shard).exists():
                self._verified.discard(shard)
                _worker_pool().submit(self._prepare_ahead, shard)

    def keep(self, shards: Iterable[int]) -> None:
        """Mark the shards as in use, so that others are deleted before them when the cache is full."""
        if not self.is_in_place:
            for shard in shards:
                with contextlib.suppress(FileNotFoundError):  # it is being fetched
                    os.utime(self.path(shard))

    def _make_reader(self, shard: int) -> "MDSReader":
        return make_shard_reader(self._local, self.index.read_entry(shard))

    def _prepare_ahead(self, shard: int) -> None:
        if _is_process_ending():
            return
        try:
            self._prepare(shard)
        except Exception as error:
            # The same error is raised to the caller when the shard is read.
            log.warning("a shard could not be fetched ahead: %s", error)

    def _thread_stream(self) -> Stream:
        """Return the calling thread's stream. A stream's downloader cannot be shared between threads."""
        if not hasattr(self._streams, "stream"):
            self._streams.stream = Stream(
                remote=None if self.is_in_place else self._shards_at,
                local=self._local,
                download_retry=2,
                download_timeout=DOWNLOAD_TIMEOUT,
                validate_hash=SHARD_HASH,
                keep_zip=False,
            )
        return self._streams.stream

    def _prepare(self, shard: int) -> None:
        """Put the raw shard in its place, and check its hash once in this process."""
        if shard in self._verified:  # without the lock: another shard of the same lock may be on its way
            return
        with self._locks[shard % NUM_LOCKS]:
            if shard in self._verified:
                return
            if _is_process_ending():
                raise RuntimeError(f"shard {self.path(shard)} is not prepared: the process is ending")
            if not self._is_intact(shard):
                if self.is_in_place:
                    raise DamagedData(
                        f"shard {self.path(shard)} is damaged or missing: its {SHARD_HASH} is not the one in "
                        "index.json. Restore the file from where it was written, or run the data step again"
                    )
                self._fetch(shard)
            if not self.is_in_place:
                os.utime(self.path(shard))  # the time of last use, by which `_evict_shards` chooses
            self._verified.add(shard)

    def _fetch(self, shard: int) -> None:
        """Download and decompress a shard into the cache."""
        reader, path = self._reader(shard), self.path(shard)
        with _lock_shard(path):
            if self._is_intact(shard):  # another process has fetched it meanwhile
                return
            _evict_shards(self._cache, self._cache_bytes - reader.raw_data.bytes, keep=path)
            # streaming treats every file that exists as complete, even a partial file of a process that was killed.
            files = [path, *([path.with_name(reader.zip_data.basename)] if reader.zip_data else [])]
            leftovers = [*files, *(file.with_name(f"{file.name}.tmp") for file in files)]
            for leftover in leftovers:
                leftover.unlink(missing_ok=True)
            try:
                self._thread_stream().prepare_shard(reader)
            except Exception as error:  # each store's client has exception types of its own
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)
                raise self._explain_fetch_error(shard, error) from error
            if not self._is_intact(shard):
                raise DamagedData(
                    f"shard {path} does not have the {SHARD_HASH} that {self.source}/index.json states. Restore "
                    f"{self._shards_at} from where it was written, or run the data step again"
                )
            # Shards that were fetched at the same time each made room for themselves alone.
            _evict_shards(self._cache, self._cache_bytes, keep=path)

    def _explain_fetch_error(self, shard: int, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
            return _explain_full_disk(self.path(shard), error)
        file = self._reader(shard).zip_data or self._reader(shard).raw_data
        return DamagedData(
            f"shard {self._shards_at}/{file.basename} is damaged, missing or out of reach at its source "
            f"({type(error).__name__}: {error}). Restore the file, or run the data step again"
        )

    def _is_intact(self, shard: int) -> bool:
        """Return whether the raw shard is there with the hash and the number of samples that index.json states."""
        try:
            data = self.path(shard).read_bytes()
        except FileNotFoundError:
            return False
        reader = self._reader(shard)
        # An MDS file begins with its number of samples as a 32-bit integer. Comparing it finds an index.json that
        # states another number.
        counted = int.from_bytes(data[:4], "little") == reader.samples
        return counted and xxhash.xxh64(data).hexdigest() == reader.raw_data.hashes[SHARD_HASH]


def _take_arrays(sample: dict[str, NDArray]) -> dict[str, NDArray]:
    """Return a sample whose columns have one dimension each; an array's own bytes state its shape."""
    if any(column.ndim != 1 for column in sample.values()):
        raise ValueError("a sample is no row of numbers")
    return sample


@functools.cache
def _worker_pool() -> ThreadPoolExecutor:
    """Return the process's pool of threads that prepare shards ahead.

    They are not daemon threads. The interpreter stops daemon threads inside native code when it ends, which can abort
    the process. It waits for the threads of an executor instead, and `_is_process_ending` keeps that wait short: each
    thread finishes the shard it works on and begins no other.
    """
    return ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="shard-worker")


def _is_process_ending() -> bool:
    """Return whether the main thread has ended and the interpreter only waits for the other threads."""
    return not threading.main_thread().is_alive()


def default_cache() -> Path:
    """Return the default cache folder: one folder per user, below the machine's temporary directory, of mode 700.

    Raises:
        RefusedInput: another user has made it.
    """
    folder = Path(find_shared_temporary()) / f"mobilemoe-shards-{os.getuid()}"
    return make_private_folder(folder, "cluster.shard_cache.folder")


def _find_shards(source: str) -> str:
    """Return the folder or address of the shards that the index.json at `source` lists: the same, or another."""
    if is_remote(source) or not (elsewhere := Path(source) / SHARDS_AT).is_file():
        return source
    return elsewhere.read_text(encoding="utf-8").strip("\n")


def _explain_full_disk(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno, f"cannot write {path} ({error}). Make room there, or name another folder as the loader's `local`"
    )


def _evict_shards(cache: Path, limit: int, keep: Path) -> None:
    """Delete the raw shards not used for the longest time until the cache holds at most `limit` bytes.

    A process that still needs a deleted shard fetches it again.
    """
    files = []
    for path in cache.glob(f"*{CACHE_SUFFIX}/*.mds"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # another process deletes shards too
            continue
        files.append((stat.st_mtime_ns, stat.st_size, path))
    excess = sum(size for _, size, _ in files) - limit
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        if path == keep:
            continue
        with contextlib.suppress(Timeout), _lock_shard(path, timeout=0):  # locked: another process is fetching it
            path.unlink(missing_ok=True)
            excess -= size


def _lock_shard(path: Path, timeout: float = -1) -> FileLock:
    """Return the file lock to hold while the shard at `path` is written or deleted.

    A few lock files serve all shards of a folder. The kernel releases them when a process is killed.
    """
    return FileLock(path.parent / f".lock-{zlib.crc32(path.name.encode()) % NUM_LOCKS}", timeout=timeout)
