"""Find the pairs of near duplicates among MinHash signatures, in tasks whose number bounds their memory.

datatrove's signature block writes a file for each unit and bucket, sorted by its rows: 8 hashes and a document. Its own
search opens the files of all units at once and merges them in Python. Here a task has one bucket and one range of the
first hash. It reads its range of every unit's file, found by bisection, one file after the other, and sorts with numpy.

Hashes are minima over a text's n-grams, and long texts have the smaller ones. So the ranges are quantiles of a sample
of the bucket's hashes, which every task of the bucket draws in the same way. Their number changes nothing of the
result: the pairs of all ranges, read in order, are those of datatrove's search, in its order and format.

Shape suffixes: N rows, S rows whose first hash others share, P pairs, U units.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig
from numpy.typing import NDArray

from core.atomic import atomic_write
from data.filters.exact_dedup import mark_repeated

MINHASH = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
SIGNATURE = np.dtype([("hashes", "<u8", (MINHASH.hashes_per_bucket,)), ("document", "<u4")])
"""A row of datatrove's signature files: the hashes of a bucket and the position of their document in the unit."""
HASH_END = 1 << 61
"""A number above all hashes: datatrove takes them modulo 2^61 - 1."""
RANGE_ROWS = 1 << 24
"""Number of rows in a range: one task holds them, in some 1.8 GB of memory."""
SAMPLE = 1 << 16
"""Number of rows from which the ranges of a bucket follow."""


class PairTask(NamedTuple):
    """One task of the search: a range of a bucket of a group."""

    group: Path
    """Folder of the group, with its `signatures` and `pairs`."""
    bucket: int
    number: int
    """Number of the range, from 0."""
    ranges: int
    """Number of the bucket's ranges."""

    @property
    def pairs_path(self) -> Path:
        """Return the path of the task's pairs. datatrove reads a group's files in the order of their names."""
        return self.group / "pairs" / f"{self.bucket:05d}_{self.number:05d}.dups"


def list_signatures(group: Path, bucket: int) -> list[Path]:
    """Return the signature files of a group's units, in their order."""
    return sorted((group / "signatures" / f"bucket_{bucket:03d}").glob("*.minhash.sig"))


def count_ranges(group: Path, range_rows: int) -> int:
    """Return the number of ranges of each bucket, so that a task holds about `range_rows` of the group's rows."""
    rows = sum(_count_rows(path) for path in list_signatures(group, 0))  # every bucket has as many
    return max(1, -(-rows // range_rows))


def _count_rows(path: Path) -> int:
    return path.stat().st_size // SIGNATURE.itemsize


class NearPairs(PipelineStep):
    """Finds the pairs of documents that agree in all hashes of a bucket; rank r does task r of a list."""

    type = "🫂 - DEDUP"
    name = "buckets"

    def __init__(self, tasks: Sequence[PairTask]):
        super().__init__()
        self.tasks = tasks

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the pairs of the task: unit and document of both, uint32 [P, 4]."""
        assert data is None and world_size == len(self.tasks)
        task = self.tasks[rank]
        with self.track_time():
            paths = list_signatures(task.group, task.bucket)
            bounds = draw_bounds(paths, task.ranges)
            parts = [read_range(path, bounds[task.number], bounds[task.number + 1]) for path in paths]
            units = [int(path.name.partition(".")[0]) for path in paths]
            pairs_P4 = find_pairs(parts, units)
            with atomic_write(task.pairs_path) as partial:
                pairs_P4.tofile(partial)
            self.stat_update("total_matches", value=len(pairs_P4))


def draw_bounds(paths: Sequence[Path], ranges: int) -> list[int]:
    """Return the bounds of a bucket's ranges: ascending, one more than ranges. They depend on the files alone.

    Rows of one first hash are never divided, so a range may hold more than its share where many documents are copies.
    """
    if ranges == 1:
        return [0, HASH_END]
    ends_U = np.cumsum([_count_rows(path) for path in paths])
    # Every task draws the same rows: numpy keeps the numbers of RandomState the same in all versions.
    drawn = np.sort(np.random.RandomState(0).randint(0, ends_U[-1], SAMPLE, np.int64))
    parts = np.split(drawn, np.searchsorted(drawn, ends_U[:-1]))
    starts = [0, *ends_U[:-1].tolist()]
    hashes = [
        _map_rows(path)["hashes"][rows - start, 0]
        for path, start, rows in zip(paths, starts, parts, strict=True)
        if len(rows)
    ]
    sample = np.sort(np.concatenate(hashes))
    return [0, *(int(sample[number * SAMPLE // ranges]) for number in range(1, ranges)), HASH_END]


def read_range(path: Path, low: int, high: int) -> NDArray:
    """Return the rows whose first hash is at least `low` and below `high`, SIGNATURE [N], without reading the others.

    A unit of which no document has a signature has an empty file.
    """
    rows = _map_rows(path) if path.stat().st_size else np.empty(0, SIGNATURE)
    first = rows["hashes"][:, 0]
    return np.array(rows[bisect_left(first, low) : bisect_left(first, high)])


def _map_rows(path: Path) -> NDArray:
    return np.asarray(np.memmap(str(path), SIGNATURE, "r"))  # of a Path numpy would look up every folder


def find_pairs(parts: Sequence[NDArray], units: Sequence[int]) -> NDArray[np.uint32]:
    """Return unit and document of every row and of the next one, uint32 [P, 4], where all their hashes are the same.

    The pairs are sorted by hashes, unit and document.

    Args:
        parts: rows of each unit, sorted, SIGNATURE [N].
        units: numbers of the units, in the order in which equal rows are to stand.
    """
    repeated_N = mark_repeated(np.concatenate([part["hashes"][:, 0] for part in parts]))
    masks = np.split(repeated_N, np.cumsum([len(part) for part in parts])[:-1])
    kept = [part[mask] for part, mask in zip(parts, masks, strict=True)]
    rows_S = np.concatenate(kept)
    units_S = np.repeat(np.array(units, np.uint32), [len(part) for part in kept])
    order_S = np.lexsort(rows_S["hashes"].T[::-1])  # stable, so equal rows stay in the order of units and documents
    hashes_S8 = rows_S["hashes"][order_S]
    places_S2 = np.stack([units_S, rows_S["document"]], axis=1)[order_S]
    equal = (hashes_S8[1:] == hashes_S8[:-1]).all(axis=1)
    return np.hstack([places_S2[:-1][equal], places_S2[1:][equal]])
