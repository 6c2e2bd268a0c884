"""Exact duplicates among synthetic hashes at published counts, and datatrove's search among the same hashes.

    python -m benchmarks.scale.exact_duplicates [--hashes 1e6] [--documents 8.6e9] [--units 16815]

First the same hashes both ways: datatrove's finder, one task that merges all files in Python, and ours; the documents
that they drop are compared. datatrove opens the files of all units at once, so it gets few units. Then ours at the
published number of units: one range with all of its hashes, of which the others are copies. A tenth of the hashes occur
elsewhere.
"""

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import ExactDedupSignature, ExactFindDedups
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

from data.catalogue.corpora import CATALOGUE
from data.filters.cell_files import read_cells
from data.filters.exact_dedup import (
    CELLS,
    POSITION,
    RANGE_HASHES,
    ExactFind,
    duplicates_path,
    repeated_path,
    write_signatures,
)

REPEATED = 0.1
"""Share of the hashes that occur in another place, too."""
CORPUS = CATALOGUE["c4-sample"]


def get_text(document: Document) -> str:
    return document.text


def make_hashes(number: int, first_cell: int, last_cell: int) -> np.ndarray:
    """Return random hashes of the cells, a share of them repeated, uint64 [number]."""
    rng = np.random.default_rng(0)
    low, high = (cell * (1 << 64) // CELLS for cell in (first_cell, last_cell))
    hashes = rng.integers(low, high, number, np.uint64)
    copies = rng.random(number) < REPEATED
    hashes[copies] = hashes[rng.integers(0, number, int(copies.sum()))]
    return hashes


def write_theirs(folder: Path, parts: list[np.ndarray]) -> ExactFindDedups:
    """Write the hashes as datatrove's signatures and return its finder."""
    config = ExactDedupConfig(get_text)
    block = ExactDedupSignature(str(folder / "signatures"), config)
    for rank, part in enumerate(parts):
        block.save_hashes(rank, [(hash_value, 1, position) for position, hash_value in enumerate(part.tolist())])
    return ExactFindDedups(str(folder / "signatures"), str(folder / "found"), config)


def write_ours(folder: Path, parts: list[np.ndarray]) -> ExactFind:
    """Write the hashes as our signatures and return our finder."""
    for rank, part in enumerate(parts):
        write_signatures(folder, rank, part)
    return ExactFind(folder, [0] * len(parts))


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Run the work in a forked process; return (seconds of processor time, GB of peak memory beyond the start)."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sender.send((time.process_time() - started, (peak - before) / 1e6))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return receiver.recv()


def compare(folder: Path, number: int, units: int) -> None:
    """Print both ways on the same hashes, and check that they drop the same documents."""
    parts = np.array_split(make_hashes(number, 0, CELLS), units)
    theirs, ours = write_theirs(folder / "theirs", parts), write_ours(folder / "ours", parts)
    seconds = [measure(lambda block=block: block.run(None, 0, 1)) for block in (theirs, ours)]
    # Among documents at one position of several units datatrove's choice follows from its heap: units are not compared.
    dropped = [np.fromfile(path, POSITION) for path in (folder / "theirs" / "found").rglob("*.c4_dup")]
    found = [np.fromfile(repeated_path(folder / "ours", rank), POSITION) for rank in range(units)]
    found.append(read_cells(duplicates_path(folder / "ours", 0, 1), POSITION, units, 0, units))
    assert np.array_equal(np.sort(np.concatenate(dropped)), np.sort(np.concatenate(found)))
    print("| finder | hashes | units | s | hashes a second | peak memory, GB |\n|---|--:|--:|--:|--:|--:|")
    for name, (elapsed, memory) in zip(("datatrove's", "ours"), seconds, strict=True):
        print(f"| {name} | {number:,} | {units:,} | {elapsed:.2f} | {number / elapsed:,.0f} | {memory:.2f} |")


def measure_range(folder: Path, documents: float, units: int) -> None:
    """Print ours on one range of the published number of hashes, and what all ranges take."""
    ranges = math.ceil(documents / RANGE_HASHES)
    number = math.ceil(documents / ranges)
    block = write_ours(folder, np.array_split(make_hashes(number, 0, CELLS // ranges), units))
    elapsed, memory = measure(lambda: block.run(None, 0, ranges))
    print(f"| ours, 1 of {ranges} ranges | {number:,} | {units:,} | {elapsed:.2f} | {number / elapsed:,.0f} ", end="")
    print(f"| {memory:.2f} |\n\nall {ranges} ranges: {ranges * elapsed / 3600:.2f} core-hours")


def main() -> None:
    """Print a row for each finder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes", type=float, default=1e6)
    parser.add_argument("--few-units", type=int, default=500)
    parser.add_argument("--documents", type=float, default=8.6e9)
    parser.add_argument("--units", type=int, default=16_815)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder) / "compared", int(arguments.hashes), arguments.few_units)
        measure_range(Path(folder) / "range", arguments.documents, arguments.units)


if __name__ == "__main__":
    main()
