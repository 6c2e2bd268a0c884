"""Check the paths and numbers that a command is given, before it starts anything.

`name` is how the user knows the value: an option, such as --out, or a positional argument in capitals. Links that lead
somewhere are followed; a link that leads nowhere is refused like a path that does not exist.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import RefusedInput
from pipelines.status import require_run


def require_between(name: str, value: int | None, least: int, most: int) -> None:
    """Check a number; None, for an option that is not given, passes.

    Raises:
        RefusedInput: it is below `least` or above `most`.
    """
    if value is not None and not least <= value <= most:
        raise RefusedInput(f"{name} {value}: give a whole number of {least:,} to {most:,}")


def require_folder(name: str, path: Path) -> None:
    """Check that a path leads to a folder that can be read.

    Raises:
        RefusedInput: it does not exist, is something else, or cannot be read.
    """
    mode = find_mode(name, path)
    if mode is None:
        raise RefusedInput(f"{name} {path}: does not exist{_describe_link(path)}; correct the path")
    if not stat.S_ISDIR(mode):
        raise RefusedInput(f"{name} {path}: is {describe_mode(mode)}, not a folder; give the folder")
    if not os.access(path, os.R_OK | os.X_OK):
        raise RefusedInput(f"{name} {path}: this user may not read it; change its permissions")


def require_run_folder(run: Path) -> None:
    """Check that a folder holds a run whose manifest can be read.

    Raises:
        RefusedInput: there is none.
    """
    if find_mode("RUN", run / "manifest.json") is not None:
        require_file("RUN", run / "manifest.json")
    require_run(run)


def require_file(name: str, path: Path) -> None:
    """Check that a path leads to a file that can be read.

    Raises:
        RefusedInput: it does not exist, is something else, or cannot be read.
    """
    mode = find_mode(name, path)
    if mode is None:
        raise RefusedInput(f"{name} {path}: does not exist{_describe_link(path)}; correct the path")
    if not stat.S_ISREG(mode):
        raise RefusedInput(f"{name} {path}: is {describe_mode(mode)}, not a file; give a file")
    if not os.access(path, os.R_OK):
        raise RefusedInput(f"{name} {path}: this user may not read it; change its permissions")


def require_new_folder(name: str, path: Path) -> None:
    """Check that nothing is at a path, and that a folder can be made there.

    Raises:
        RefusedInput: something is there, a link that leads nowhere included, or nothing can be written there.
    """
    if find_mode(name, path) is not None or path.is_symlink():
        raise RefusedInput(f"{name} {path}: exists{_describe_link(path)}; name a folder that does not")
    require_writable(name, path)


def require_output_folder(name: str, path: Path) -> None:
    """Check that a path is a folder that can be written to, or that one can be made there.

    Raises:
        RefusedInput: something else is there, a link that leads nowhere included, or nothing can be written there.
    """
    mode = find_mode(name, path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise RefusedInput(
            f"{name} {path}: is {describe_mode(mode)}, not a folder; name a folder, or a path without one"
        )
    if mode is None and path.is_symlink():
        raise RefusedInput(f"{name} {path}: leads nowhere{_describe_link(path)}; remove the link, or name a folder")
    require_writable(name, path)


def require_writable(name: str, path: Path) -> None:
    """Check that files can be made at a path, or in the nearest folder above it that exists.

    A file without a name is made there and dropped: permissions alone do not tell (a read-only disk, /proc, root).

    Raises:
        RefusedInput: no file can be made.
    """
    nearest = Path(os.path.abspath(path))
    while (mode := find_mode(name, nearest)) is None:
        if nearest.is_symlink():
            raise RefusedInput(f"{name} {path}: {nearest} leads nowhere{_describe_link(nearest)}; name another folder")
        nearest = nearest.parent
    if not stat.S_ISDIR(mode):
        raise RefusedInput(f"{name} {path}: {nearest} is {describe_mode(mode)}, not a folder; name another folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise RefusedInput(
            f"{name} {path}: nothing can be written to {nearest} ({error.strerror}); name another folder, or change "
            "its permissions"
        ) from error


def require_output_file(name: str, path: Path) -> None:
    """Check that a path is a file that can be written, or that one can be made there.

    Raises:
        RefusedInput: something else is there, or nothing can be written there.
    """
    mode = find_mode(name, path)
    if mode is not None and not stat.S_ISREG(mode):
        raise RefusedInput(f"{name} {path}: is no file; name another path")
    require_writable(name, path.parent)


def require_apart(name: str, path: Path, source_name: str, source: Path) -> None:
    """Check that an output is neither the source, nor in it, nor around it, however the two are spelled.

    Args:
        source: folder that exists.

    Raises:
        RefusedInput: the two share files.
    """
    find_mode(name, path)
    for inner, outer, relation in ((path, source, "lies inside"), (source, path, "contains")):
        for folder in _list_ancestors(inner):
            if outer.exists() and folder.exists() and folder.samefile(outer):
                relation = "is" if inner.exists() and inner.samefile(outer) else relation
                raise RefusedInput(f"{name} {path}: {relation} {source_name} {source}; name a folder outside of it")


def require_plain_content(name: str, folder: Path) -> None:
    """Check that a folder to write to holds files and folders only, where it exists.

    A link in it would lead the writing elsewhere, and a pipe would make it wait for ever.

    Raises:
        RefusedInput: there is a link, a pipe, a socket or a device in it.
    """
    for root, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = Path(root, entry)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise RefusedInput(
                    f"{name} {folder}: {path} is {describe_mode(mode)}; remove it, or name another folder"
                )


def beside(folder: Path, suffix: str) -> Path:
    """Return the path FOLDER + suffix, beside the folder, also where it is given as `.` or ends with a slash."""
    path = Path(os.path.abspath(folder))
    return path.parent / f"{path.name}{suffix}"


@contextmanager
def refuse_os_errors(name: str) -> Iterator[None]:
    """Turn an OSError of the block, which only reads, into a RefusedInput that names the option and the file."""
    try:
        yield
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise RefusedInput(f"{name}{where}: {error.strerror or error}; correct the path or its permissions") from error


def find_mode(name: str, path: Path) -> int | None:
    """Return what a path leads to, as `st_mode`; None where nothing is there.

    Raises:
        RefusedInput: the system cannot say: links that lead to each other, a name that is too long, no permission.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RefusedInput(f"{name} {path}: {error.strerror}; correct the path, or its permissions") from error


def describe_mode(mode: int) -> str:
    """Return what an `st_mode` stands for, in words."""
    kinds = {
        stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds[stat.S_IFMT(mode)]


def _describe_link(path: Path) -> str:
    return f" (a link to {os.readlink(path)})" if path.is_symlink() else ""


def _list_ancestors(path: Path) -> list[Path]:
    """Return a path and the folders above it, links resolved."""
    real = Path(os.path.realpath(path))
    return [real, *real.parents]
