"""Slices: parts of benchmarks that are scored apart, by one process or by many, each kept once it is scored.

A slice's result does not depend on what else is scored, or where, so a killed evaluation loses one slice a process.
"""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from core.atomic import write_bytes, write_json

SLICE_ITEMS = 512
"""Largest number of items of a slice: minutes of a large model on a GPU, or of a small one on a CPU."""


@dataclass(frozen=True)
class Slice:
    """Items `start` to `stop` of a benchmark, in the order of its tasks."""

    benchmark: str
    """Key of the benchmark."""
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of its files, which sorts as its items do."""
        return f"{self.benchmark}.{self.start:07d}-{self.stop:07d}"

    def __len__(self) -> int:
        """Return the number of items."""
        return self.stop - self.start


def cut_benchmark(key: str, n_items: int) -> list[Slice]:
    """Return the slices of a benchmark of `n_items` items."""
    starts = range(0, n_items, SLICE_ITEMS)
    return [Slice(key, start, min(start + SLICE_ITEMS, n_items)) for start in starts]


def locate_items(sizes: Sequence[int], start: int, stop: int) -> dict[int, range]:
    """Return which items of which tasks are numbers `start` to `stop` of all tasks' items, one task after the other.

    Args:
        sizes: number of items of every task.

    Returns:
        Number of the task -> numbers of its items; tasks without an item there are left out.
    """
    found, before = {}, 0
    for number, size in enumerate(sizes):
        numbers = range(max(start - before, 0), min(stop - before, size))
        if numbers:
            found[number] = numbers
        before += size
    return found


class SliceFolder:
    """Results of slices in a folder that all processes see, and which process has taken which slice."""

    def __init__(self, folder: Path):
        """Name the folder; it is made when the first slice is taken or written."""
        self.folder = folder

    def read(self, part: Slice, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the result of a slice, None if it has none of this identity."""
        path = self._path(part)
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if identity.items() <= found.items() else None

    def write(self, part: Slice, result: dict[str, Any], samples: list[dict]) -> None:
        """Keep the result and the samples of a slice."""
        write_bytes(self._samples_path(part), compress_samples(samples))
        write_json(self._path(part), result)

    def read_samples(self, parts: Iterable[Slice]) -> list[dict]:
        """Return the samples of slices, one after the other."""
        return [sample for part in parts for sample in read_samples(self._samples_path(part))]

    def take(self, part: Slice, owner: str) -> bool:
        """Take a slice for one process, and return whether it is that process's now.

        A process that was killed and started again under its name keeps what it had taken. Files that end in `.taken`
        name the owners; whoever starts all processes again removes them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{part.name}.taken"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(owner)
        except FileExistsError:
            return path.read_text(encoding="utf-8") == owner
        return True

    def remove(self, keys: Iterable[str]) -> None:
        """Remove the slices of benchmarks, and the folder if it is empty then: others may have begun and not ended."""
        for path in [path for key in keys for path in self.folder.glob(f"{key}.*")]:
            path.unlink()
        if self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, part: Slice) -> Path:
        return self.folder / f"{part.name}.json"

    def _samples_path(self, part: Slice) -> Path:
        return self.folder / f"{part.name}.samples.jsonl.zst"


def read_samples(path: Path) -> list[dict]:
    """Read a per-item log as `compress_samples` made it."""
    with zstandard.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def compress_samples(samples: list[dict]) -> bytes:
    """Return a per-item log: one JSON object a line (task, document, prompts, answers, metrics), zstd."""
    from eval import compat

    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(level=6).stream_writer(buffer, closefd=False) as stream:
        for sample in samples:
            line = json.dumps(sample, ensure_ascii=False, default=compat.make_serializable)
            stream.write(line.encode() + b"\n")
    return buffer.getvalue()
