"""Files of JSON lines that grow for weeks: cut from their end, and read without holding them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from core.inside import refuse_links

BLOCK_BYTES = 1 << 16


def cut_last_lines(path: Path, is_cut: Callable[[dict[str, Any]], bool]) -> None:
    """Cut the lines at the end of a file for which `is_cut` holds, and a last line that a killed process left torn.

    Only these lines and the one before them are read.
    """
    with open(path, "rb+", opener=refuse_links) as file:
        end = file.seek(0, os.SEEK_END)
        for start, line in _read_backwards(file, end):
            if line.endswith(b"\n") and not is_cut(json.loads(line)):
                break
            end = start
        file.truncate(end)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file that may be growing, but a last line that has no end yet; none if it is absent."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _read_backwards(file: IO[bytes], end: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) from the last line to the first; a line ends with its line feed, but perhaps the last."""
    rest, position = b"", end
    while position > 0:
        start = max(0, position - BLOCK_BYTES)
        file.seek(start)
        rest = file.read(position - start) + rest
        position = start
        lines = [line + b"\n" for line in rest.split(b"\n")]
        lines[-1] = lines[-1][:-1]  # what stands after the last line feed: nothing, or a torn line
        lines = [line for line in lines if line]
        if start > 0:
            rest, lines = lines[0], lines[1:]
            offset = start + len(rest)
        else:
            rest, offset = b"", 0
        offsets = []
        for line in lines:
            offsets.append(offset)
            offset += len(line)
        yield from reversed(list(zip(offsets, lines, strict=True)))
