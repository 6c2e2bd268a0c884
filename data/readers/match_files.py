"""Find the files below a folder, local or on a store, that match a pattern. Only the pattern is one, not the folder.

The rules are a shell's: `**` stands for any number of folders, and a name that begins with a dot (`.cache`,
`._copy.jsonl`) is matched only where the pattern spells the dot. Links are followed, each folder once.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import fsspec
from fsspec.implementations.local import LocalFileSystem

FILE_SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".gz", ".bz2", ".xz", ".zst", ".zip")


def match_files(fs: fsspec.AbstractFileSystem, root: str, pattern: str) -> list[str]:
    """Return the sorted paths of the files below `root` that match.

    A folder that is named as a file is among them, unless files in it match too: Spark writes a folder `x.parquet` with
    parts in it. To read it as a file fails and names it, where to leave it out would lose its rows in silence.

    Raises:
        PermissionError: a folder on the way may not be listed.
    """
    root, parts = root.rstrip("/"), pattern.strip("/").split("/")
    if parts[-1] == "**":
        parts.append("*")
    if isinstance(fs, LocalFileSystem):
        matched = {path: os.path.isdir(path) for path in _match_local(root, parts)}
    else:
        found = fs.glob("/".join([glob.escape(root), *parts]), detail=True)
        shown = [path for path in found if "/." in f"/{pattern}" or "/." not in path.removeprefix(root)]
        matched = {path: found[path]["type"] == "directory" for path in shown}
    return sorted(path for path, folder in matched.items() if not folder or _is_named_as_a_file(path, matched))


def _is_named_as_a_file(folder: str, matched: dict[str, bool]) -> bool:
    return folder.endswith(FILE_SUFFIXES) and not any(path.startswith(f"{folder}/") for path in matched)


def _match_local(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the paths below a folder that match, a part of the pattern for each level."""
    part, *rest = parts
    if part == "**":
        for below in _list_folders(folder):
            yield from _match_local(below, rest)
        return
    if glob.has_magic(part):
        names = [name for name in _list_names(folder) if fnmatchcase(name, part)]
        names = [name for name in names if part.startswith(".") or not name.startswith(".")]
    else:
        names = [part] if os.path.lexists(f"{folder}/{part}") else []
    for name in names:
        path = f"{folder}/{name}"
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _match_local(path, rest)


def _list_names(folder: str) -> list[str]:
    try:
        return os.listdir(folder or "/")
    except (FileNotFoundError, NotADirectoryError):
        return []


def _list_folders(top: str) -> Iterator[str]:
    """Yield a folder and all folders below it. Links may lead back to where they are, so each folder comes once."""
    seen = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        yield folder
        paths = [f"{folder}/{name}" for name in _list_names(folder) if not name.startswith(".")]
        waiting += [path for path in paths if os.path.isdir(path)]
