"""Files and folders that appear complete or not at all: written beside their place, then renamed."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def partial_path(path: Path) -> Path:
    """Return where an output is written before it is complete: NAME.partial beside it."""
    return path.with_name(f"{path.name}.partial")


@contextmanager
def atomic_write(path: Path, *, keep_partial: bool = False) -> Iterator[Path]:
    """Yield `partial_path(path)` to write a file or a folder to, and rename it to `path` when the block ends well.

    A file at `path` is replaced. A folder must not be there yet: a rename cannot replace one that holds files.

    Args:
        keep_partial: keep what an interrupted block left, for work that resumes in it; otherwise it is removed.
    """
    partial = partial_path(path)
    if not keep_partial:
        remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file by `content`, flushed to the disk first; its folder is made where it is missing.

    Several processes and threads may write the same file: the last one wins, and no reader sees a part. Where the disk
    is full, the error is raised and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 text file, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, as `write_bytes`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
