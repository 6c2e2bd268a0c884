"""Files of rows that lie in numbered cells, so that the rows of neighbouring cells are read without the others.

A file begins with the position of every cell's first row, uint32 [number of cells + 1], and the rows follow, sorted by
their cell. One task writes one file. Thousands of others each read a slice of it, one open file at a time.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.atomic import atomic_write

_POSITION = np.dtype("<u4")


def write_cells(path: Path, rows_N: NDArray, cells_N: NDArray[np.integer], num_cells: int) -> None:
    """Write rows, any dtype [N], whose cells are `cells_N`: ascending, from 0 to `num_cells` - 1."""
    positions = np.searchsorted(cells_N, np.arange(num_cells + 1)).astype(_POSITION)
    with atomic_write(path) as partial:
        partial.write_bytes(positions.tobytes() + rows_N.tobytes())


def read_cells(path: Path, dtype: np.dtype, num_cells: int, first: int, last: int) -> NDArray:
    """Return the rows of the cells from `first` to before `last`, in the order they were written, `dtype` [N]."""
    with path.open("rb") as file:
        file.seek(first * _POSITION.itemsize)
        positions = np.frombuffer(file.read((last - first + 1) * _POSITION.itemsize), _POSITION)
        begin, end = int(positions[0]), int(positions[-1])
        file.seek((num_cells + 1) * _POSITION.itemsize + begin * dtype.itemsize)
        return np.frombuffer(file.read((end - begin) * dtype.itemsize), dtype)


def count_rows(path: Path, dtype: np.dtype, num_cells: int) -> int:
    """Return the number of rows of a file, from its size."""
    return (path.stat().st_size - (num_cells + 1) * _POSITION.itemsize) // dtype.itemsize
