"""Receive files from an address: inside one folder, of the announced size, and with the stated hash."""

import hashlib
import io
import os
from typing import TYPE_CHECKING, Any

from core.errors import DamagedData, RefusedInput
from core.inside import PARTIAL, Folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK_BYTES = 8 << 20
"""Size of the parts in which a file is read."""
MAX_UNANNOUNCED_BYTES = 64 << 30
"""Largest file of which the other side does not say how large it is."""


class Receiving(io.FileIO):
    """A file that is appended to, and refuses more bytes than were announced."""

    def __init__(self, descriptor: int, remote: str, announced: int | None):
        super().__init__(descriptor, "a+")
        self._remote, self._announced = remote, announced

    def size(self) -> int:
        """Return the number of bytes that the file has."""
        return os.fstat(self.fileno()).st_size

    def append(self, data: bytes) -> None:
        """Write all of `data` at the end.

        Raises:
            DamagedData: there would be more than was announced, or than MAX_UNANNOUNCED_BYTES.
            OSError: the disk is full.
        """
        limit = MAX_UNANNOUNCED_BYTES if self._announced is None else self._announced
        if self.size() + len(data) > limit:
            rule = "that a file may have without saying its size" if self._announced is None else "that were announced"
            raise DamagedData(
                f"{self._remote} sends more than the {limit:,} bytes {rule}; nothing of it is kept. Have it published "
                "again, or fetch from another address"
            )
        rest = memoryview(data)
        while rest:
            rest = rest[self.write(rest) :]


def read_small_file(system: "AbstractFileSystem", remote: str, limit: int) -> bytes:
    """Return the content of a file that is held in memory.

    Raises:
        RefusedInput: it has more than `limit` bytes.
        OSError, and others of the file system: it is missing or cannot be read.
    """
    content = bytearray()
    with _open_stream(system, remote) as source:
        while block := source.read(min(BLOCK_BYTES, limit + 1)):
            content += block
            if len(content) > limit:
                raise RefusedInput(f"{remote} has more than {limit:,} bytes, which no such file has; check the address")
    return bytes(content)


def receive_file(
    system: "AbstractFileSystem", remote: str, folder: Folder, name: str, expected: str | None, list_name: str
) -> None:
    """Receive one file into a folder, unless it is there already. A part of it that is there is continued.

    Args:
        name: its name below the folder.
        expected: its SHA-256; None accepts any content, and receives the file anew.
        list_name: name of the file that lists it and states the hash.

    Raises:
        RefusedInput: the name is not a plain one, or something in the folder would lead elsewhere.
        DamagedData: the file is missing, or larger than was announced, or has another hash; what was received of it is
            removed.
        OSError: receiving was cut off.
    """
    if expected is not None and _hash(folder, name) == expected:
        return
    partial = name + PARTIAL
    try:
        announced = _find_size(system, remote)
        with Receiving(folder.open(partial, "append"), remote, announced) as file:
            is_continued = expected is not None and _continue(system, remote, file, announced)
            if not is_continued:
                file.truncate(0)
                _append_all(system, remote, file)
            os.fsync(file.fileno())
            received = file.size()
    except FileNotFoundError as error:
        raise DamagedData(f"{remote} is listed in {list_name} but missing there; have it published again") from error
    except DamagedData:
        folder.remove(partial)
        raise
    if announced is not None and received < announced:
        raise ConnectionError(f"{remote} ended after {received:,} of the {announced:,} bytes that were announced")
    if expected is not None and (found := _hash(folder, partial)) != expected:
        # The part that was there may be of another file, so the next call starts over.
        folder.remove(partial)
        raise DamagedData(f"{remote} has SHA-256 {found}, {list_name} says {expected}; fetch again or have it repaired")
    folder.replace(partial, name)


def _open_stream(system: "AbstractFileSystem", remote: str) -> Any:
    """Open a remote file to read it from its beginning to its end, as it comes."""
    if "http" in system.protocol:
        # Without a size fsspec asks the server for it first, and takes every failure for a missing file.
        return system.open(remote, "rb", block_size=0, size=1)
    if "hf" in system.protocol:
        system.info(remote)  # a missing file is a FileNotFoundError here alone
    return system.open(remote, "rb", block_size=0)


def _find_size(system: "AbstractFileSystem", remote: str) -> int | None:
    """Return the size in bytes that a file system states of a file; None where it states none."""
    try:
        return system.info(remote)["size"]
    except FileNotFoundError as error:
        reason = error.__cause__  # fsspec's HTTP file system hides lost connections behind this error
        if reason is not None and getattr(reason, "status", None) not in (404, 410):
            raise ConnectionError(f"{remote}: {type(reason).__name__}: {reason}") from error
        raise


def _append_all(system: "AbstractFileSystem", remote: str, file: Receiving) -> None:
    """Append the whole remote file, as it comes."""
    try:
        with _open_stream(system, remote) as source:
            while block := source.read(BLOCK_BYTES):
                file.append(block)
    except (OSError, DamagedData):
        raise
    except Exception as error:  # each file system has errors of its own (aiohttp's, pyarrow's, the hub's)
        raise ConnectionError(f"{remote}: {type(error).__name__}: {error}") from error


def _continue(system: "AbstractFileSystem", remote: str, file: Receiving, announced: int | None) -> bool:
    """Append to a file what it lacks of the remote one.

    Returns:
        False where there is nothing to continue, or where the other side sends whole files only.
    """
    have = file.size()
    if not have or announced is None or have > announced:
        return False
    try:
        with system.open(remote, "rb") as source:
            source.seek(have)
            while (have := file.size()) < announced:
                block = source.read(min(BLOCK_BYTES, announced - have))
                if not block:
                    return False
                file.append(block)
    except ValueError:  # a server that ignores the range it is asked for
        return False
    return True


def _hash(folder: Folder, name: str) -> str | None:
    """Return the SHA-256 of a file below a folder; None where there is none."""
    try:
        with os.fdopen(folder.open(name, "read"), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
