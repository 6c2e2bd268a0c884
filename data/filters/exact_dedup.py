"""Remove exact duplicates, over all corpora at once: of equal texts one is kept, in the corpus that is read first.

Texts are equal when their 64-bit hashes are. A text and a conversation never are, so that the corpora of one kind
decide nothing about those of the other. Three blocks work on one folder:

1. `ExactSignature` ends the step that reads a unit. It writes one file: the unit's hashes, sorted, in CELLS cells by
   their first bits. Repetitions inside of the unit are found there, and are not among the hashes.
2. `ExactFind` has a task for each range of hashes. It reads its cells of every unit's file, one after the other, sorts
   them with numpy, and writes one file: the duplicates of its range, in one cell for each unit.
3. `ExactFilter` reads its unit's cell of every range, and drops those documents. It knows a document by its position.

So there are as many files as units and ranges together, a task has one of them open, and the number of ranges changes
nothing of the result. It follows from the number of hashes (`count_ranges`), which bounds the memory of a task.

Shape suffixes: N hashes or documents.
"""

from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from core.atomic import atomic_write, link_file
from data import compat
from data.filters.cell_files import count_rows, read_cells, write_cells

CELL_BITS = 12
"""Number of the first bits of a hash that are its cell."""
CELLS = 1 << CELL_BITS
"""Number of cells of a unit's hashes, and the largest number of ranges."""
RANGE_HASHES = 1 << 25
"""Number of hashes in a range: one task holds them, in some 1.5 GB of memory."""
SIGNATURE = np.dtype([("hash", "<u8"), ("document", "<u4")])
"""A hash and the position of its document in the unit."""
POSITION = np.dtype("<u4")


def hashes_path(folder: Path, rank: int) -> Path:
    return folder / "hashes" / f"{rank:05d}"


def repeated_path(folder: Path, rank: int) -> Path:
    return folder / "repeated" / f"{rank:05d}"


def duplicates_path(folder: Path, number: int, ranges: int) -> Path:
    return folder / "duplicates" / f"{number:05d}_of_{ranges:05d}"


class ExactSignature(PipelineStep):
    """Writes the hashes of the rank's documents; the last block of a step."""

    type = "🫂 - DEDUP"
    name = "exact signatures"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Hash all documents, then write their signatures."""
        hashes = array("Q")
        for document in data:
            with self.track_time():
                self.stat_update(compat.FILTER_INPUT)
                seed = 0 if document.metadata["kind"] == "text" else 1
                hashes.append(xxh64_intdigest(document.text.encode(), seed))
        with self.track_time():
            write_signatures(self.folder, rank, np.frombuffer(hashes, np.uint64))


def write_signatures(folder: Path, rank: int, hashes_N: NDArray[np.uint64]) -> None:
    """Write the hashes of a unit's documents, given in their order, and which of them repeat an earlier one."""
    order_N = np.argsort(hashes_N, kind="stable")
    sorted_N = hashes_N[order_N]
    is_first_N = np.ones(len(sorted_N), np.bool_)
    is_first_N[1:] = sorted_N[1:] != sorted_N[:-1]
    with atomic_write(repeated_path(folder, rank)) as partial:
        np.sort(order_N[~is_first_N]).astype(POSITION).tofile(partial)
    rows = np.empty(int(is_first_N.sum()), SIGNATURE)
    rows["hash"], rows["document"] = sorted_N[is_first_N], order_N[is_first_N]
    write_cells(hashes_path(folder, rank), rows, rows["hash"] >> np.uint64(64 - CELL_BITS), CELLS)


def keep_signatures(folder: Path, rank: int, target: Path) -> None:
    """Link the hashes of a unit's documents into the folder `target`, for `add_signatures` of a later data set."""
    link_file(hashes_path(folder, rank), target / f"{rank:05d}")


def add_signatures(folder: Path, source: Path, first_unit: int) -> int:
    """Add the hashes of another data set's corpus as those of further units, and return the number of these."""
    files = sorted(source.iterdir())
    for number, file in enumerate(files, first_unit):
        link_file(file, hashes_path(folder, number))
    return len(files)


def count_ranges(folder: Path, units: int, range_hashes: int = RANGE_HASHES) -> int:
    """Return the number of ranges for the hashes that the units have written, so that a task holds `range_hashes`."""
    hashes = sum(count_rows(hashes_path(folder, rank), SIGNATURE, CELLS) for rank in range(units))
    return min(max(1, -(-hashes // range_hashes)), CELLS)


class ExactFind(PipelineStep):
    """Finds the documents whose text occurs elsewhere, among the hashes of one range: range `rank` of `world_size`."""

    type = "🫂 - DEDUP"
    name = "exact duplicates"

    def __init__(self, folder: Path, places: Sequence[int]):
        """Args: places: of each unit that wrote hashes, the place of its corpus in the reading order."""
        super().__init__()
        self.folder = folder
        self.units = range(len(places))
        self.corpora_U = np.array(places)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the duplicates of the range."""
        assert data is None and world_size <= CELLS
        with self.track_time():
            first, last = rank * CELLS // world_size, (rank + 1) * CELLS // world_size
            parts = [read_cells(hashes_path(self.folder, unit), SIGNATURE, CELLS, first, last) for unit in self.units]
            units_N = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
            hashes_N = np.concatenate([part["hash"] for part in parts])
            documents_N = np.concatenate([part["document"] for part in parts])
            del parts
            extra_N = find_extra(hashes_N, documents_N, units_N, self.corpora_U)
            extra_N = extra_N[np.lexsort((documents_N[extra_N], units_N[extra_N]))]
            path = duplicates_path(self.folder, rank, world_size)
            write_cells(path, documents_N[extra_N], units_N[extra_N], len(self.units))


def find_extra(
    hashes_N: NDArray[np.uint64],
    documents_N: NDArray[np.uint32],
    units_N: NDArray[np.uint32],
    corpora_U: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the indices of all documents but one of each hash.

    Kept is the one in the first corpus; in one corpus, that with the lowest position in its unit, then the first unit.

    Args:
        documents_N: position of each document in its unit.
        corpora_U: number of each unit's corpus.
    """
    shared_N = np.flatnonzero(mark_repeated(hashes_N))
    corpora_N = corpora_U[units_N[shared_N]]
    shared_N = shared_N[np.lexsort((units_N[shared_N], documents_N[shared_N], corpora_N, hashes_N[shared_N]))]
    return shared_N[1:][hashes_N[shared_N[1:]] == hashes_N[shared_N[:-1]]]


def mark_repeated(hashes_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which of the hashes occur more than once, bool [N]."""
    order_N = np.argsort(hashes_N)
    sorted_N = hashes_N[order_N]
    repeats_N = sorted_N[1:] == sorted_N[:-1]
    is_shared_N = np.zeros(len(sorted_N), np.bool_)
    is_shared_N[1:] |= repeats_N
    is_shared_N[:-1] |= repeats_N
    marked_N = np.zeros(len(sorted_N), np.bool_)
    marked_N[order_N[is_shared_N]] = True
    return marked_N


class ExactFilter(PipelineStep):
    """Drops the documents that `ExactSignature` and the tasks of `ExactFind` have found to be repetitions."""

    type = "🫂 - DEDUP"
    name = "exact filter"

    def __init__(self, folder: Path, units: int, ranges: int):
        super().__init__()
        self.folder, self.units, self.ranges = folder, units, ranges

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents that are kept. They come in the order in which the signatures were written."""
        with self.track_time():
            extra = self._read_extra(rank)
        for position, document in enumerate(data):
            self.stat_update(compat.FILTER_INPUT)
            if position in extra:
                extra.remove(position)
                self.stat_update(compat.FILTER_DROPPED)
            else:
                self.stat_update(compat.FILTER_OUTPUT)
                self.update_doc_stats(document)
                yield document
        assert not extra, f"rank {rank} has fewer documents than signatures"

    def _read_extra(self, rank: int) -> set[int]:
        """Return the positions of the unit's documents that are dropped."""
        parts = [np.fromfile(repeated_path(self.folder, rank), POSITION)]
        for number in range(self.ranges):
            path = duplicates_path(self.folder, number, self.ranges)
            parts.append(read_cells(path, POSITION, self.units, rank, rank + 1))
        return set(np.concatenate(parts).tolist())
