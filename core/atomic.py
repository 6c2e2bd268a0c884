"""Write files and folders so that they appear complete or not at all: written beside their path first, then renamed."""

import errno
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_LINK_ERRNOS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of a link to another file system, on one without links, or of a file with too many of them."""
NO_FOLDER_SYNC_ERRNOS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""Errors of file systems that cannot flush a folder."""
LEFTOVER = re.compile(r"\..+\.\d+\.\d+\.partial", re.DOTALL)
"""Names of the files that `write_bytes` writes to before it renames them."""


def partial_path(path: Path) -> Path:
    """Return the path beside `path` at which an output is written until it is complete: NAME.partial."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def atomic_write(path: Path, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `partial_path(path)` to write a file or a folder to, and rename it to `path` when the block ends normally.

    Everything is flushed to the disk before the rename, so that after a loss of power too it is whole or not there.

    A file at `path` is replaced. A folder must not exist yet: a rename cannot replace a folder that holds files. If the
    block raises, nothing appears at `path` and the partial output stays for inspection.

    Args:
        keep_partial: keep the partial output of an interrupted block, for work that resumes in it. By default it is
            removed before the block starts.

    Raises:
        OSError: `path` is a folder that holds files.
    """
    partial = partial_path(path)
    if not keep_partial:
        remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    _sync(partial)
    os.replace(partial, path)
    sync_folder(path.parent)


def _sync(path: Path) -> None:
    """Flush a file, or a folder with everything in it, to the disk; links are left alone."""
    if not path.is_dir():
        _sync_file(path)
        return
    for root, _, files in os.walk(path):
        for name in files:
            if not (file := Path(root, name)).is_symlink():
                _sync_file(file)
        sync_folder(Path(root))


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder's files to the disk: a rename may else be lost with the power, or come too early."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync_open_folder(descriptor)
    finally:
        os.close(descriptor)


def sync_open_folder(descriptor: int) -> None:
    """Flush the names of an open folder's files as `sync_folder` does; some file systems cannot, which is no error."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC_ERRNOS:
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content`, flushed to the disk before the rename. Missing parent folders are created.

    Several processes and threads may write the same file: the last one wins, and no reader sees a part of a file.

    Raises:
        OSError: the disk is full or the path cannot be written; no partial file is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name holds process and thread, so that two writers of one file never share a partial file.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed process that had the same number
        with partial.open("xb") as file:  # which follows no link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file by a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as indented JSON, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def link_file(source: Path, path: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links; a file at `path` is replaced.

    Missing parent folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError as error:
        if error.errno not in NO_LINK_ERRNOS:
            raise
        shutil.copyfile(source, partial)
    os.replace(partial, path)
    partial.unlink(missing_ok=True)  # a rename does nothing where both names are of one file


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it. A missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def find_free_path(path: Path) -> Path:
    """Return the path, or NAME-2, NAME-3 ... beside it, the first that does not exist."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(candidate for candidate in names if not candidate.exists())


def remove_leftovers(folder: Path, *, skip: Collection[Path] = ()) -> None:
    """Remove the partial files that killed writers of `write_bytes` left anywhere below a folder.

    No writer may be at work there. Links are not followed.

    Args:
        skip: files and folders to leave alone.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(root, name) not in skip]
        for name in files:
            if LEFTOVER.fullmatch(name):
                Path(root, name).unlink()
