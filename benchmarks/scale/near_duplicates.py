"""Pairs of near duplicates among synthetic signatures at published counts, and datatrove's search among the same.

    python -m benchmarks.scale.near_duplicates [--rows 1e6] [--documents 160e6] [--units 16800]

First the same signatures of one bucket both ways: datatrove's search, one task that merges all files in Python, and
ours, whose pairs must be the same bytes. datatrove opens the files of all units at once, so it gets few units. Then
ours at the published size: the last range of a bucket, in files as large as those of the whole bucket. What lies before
the range, and is not read, is a hole in each file that reads as zeros. A tenth of the signatures occur elsewhere, too.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np
from datatrove.pipeline.dedup import MinhashDedupBuckets

from benchmarks.scale.exact_duplicates import REPEATED, measure
from data.compat import LocalFolder
from data.filters.near_pairs import HASH_END, MINHASH, RANGE_ROWS, SIGNATURE, NearPairs, PairTask


def make_rows(number: int) -> np.ndarray:
    """Return random signatures, a share of them repeated, SIGNATURE [number]."""
    rng = np.random.default_rng(0)
    rows = np.zeros(number, SIGNATURE)
    rows["hashes"] = rng.integers(1, HASH_END - 1, (number, MINHASH.hashes_per_bucket), np.uint64)
    copies = np.flatnonzero(rng.random(number) < REPEATED)
    rows["hashes"][copies] = rows["hashes"][rng.integers(0, number, len(copies))]
    return rows


def write_bucket(group: Path, rows: np.ndarray, units: int, hole: int = 0) -> None:
    """Write bucket 0 of a group: the rows divided among units, each file sorted behind a hole of `hole` rows."""
    folder = group / "signatures" / "bucket_000"
    folder.mkdir(parents=True)
    for unit, part in enumerate(np.array_split(rows, units)):
        part["document"] = np.arange(hole, hole + len(part))
        order = np.lexsort((part["document"], *part["hashes"].T[::-1]))
        with (folder / f"{unit:05d}.minhash.sig").open("wb") as file:
            os.ftruncate(file.fileno(), hole * SIGNATURE.itemsize)
            file.seek(0, os.SEEK_END)
            file.write(part[order].tobytes())


def compare(folder: Path, number: int, units: int) -> None:
    """Print both ways on the same signatures, and check that they find the same pairs."""
    write_bucket(folder, make_rows(number), units)
    theirs = MinhashDedupBuckets(LocalFolder(folder / "signatures"), LocalFolder(folder / "theirs"), config=MINHASH)
    task = PairTask(folder, 0, 0, 1)
    seconds = {
        "datatrove's": measure(lambda: theirs.run(None, 0, MINHASH.num_buckets)),
        "ours": measure(lambda: NearPairs([task]).run(None, 0, 1)),
    }
    (found,) = (folder / "theirs").iterdir()
    assert found.stat().st_size and found.read_bytes() == task.pairs_path.read_bytes()
    print("| search | signatures | units | s | signatures a second | peak memory, GB |\n|---|--:|--:|--:|--:|--:|")
    for name, (elapsed, memory) in seconds.items():
        print(f"| {name} | {number:,} | {units:,} | {elapsed:.2f} | {number / elapsed:,.0f} | {memory:.2f} |")


def measure_range(folder: Path, documents: int, units: int) -> None:
    """Print ours on the last range of a bucket of the published size, and what all ranges of all buckets take."""
    ranges = math.ceil(documents / RANGE_ROWS)
    # The range begins at a quantile of a sample, so somewhat more than its share is written.
    written = min(documents, math.ceil(1.1 * documents / ranges))
    write_bucket(folder, make_rows(written), units, (documents - written) // units)
    task = PairTask(folder, 0, ranges - 1, ranges)
    elapsed, memory = measure(lambda: NearPairs([task]).run(None, 0, 1))
    number, tasks = documents / ranges, MINHASH.num_buckets * ranges
    print(f"| ours, 1 of {ranges} ranges of a bucket | {number:,.0f} | {units:,} | {elapsed:.2f} ", end="")
    print(f"| {number / elapsed:,.0f} | {memory:.2f} |\n\nall {tasks} tasks: {tasks * elapsed / 3600:.2f} core-hours")


def main() -> None:
    """Print a row for each search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e6)
    parser.add_argument("--few-units", type=int, default=500)
    parser.add_argument("--documents", type=float, default=160e6)
    parser.add_argument("--units", type=int, default=16_800)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder) / "compared", int(arguments.rows), arguments.few_units)
        measure_range(Path(folder) / "range", int(arguments.documents), arguments.units)


if __name__ == "__main__":
    main()
