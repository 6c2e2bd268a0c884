"""The units of the open corpora at their published sizes, and how long their first step takes on many cores.

    python -m benchmarks.scale.data_units [--file-bytes 300e6] [--workers 1000]

Simulated: every corpus is a listing of equal files that hold its published text, compressed to two fifths. Units are
made by data/sources.py; each takes what its text takes at the measured rate of data/planning.py, and the largest begin
first. Beside it stands the division of earlier versions, 64 parts a text corpus and 16 a corpus of conversations.
"""

import argparse
import heapq
import math

from data.catalogue.open_corpora import OPEN_CORPORA
from data.planning import MEASURED
from data.sources import UNIT_TEXT_BYTES, SourceFile, divide_files

COMPRESSION = 2.5


def schedule(hours: list[float], workers: int) -> float:
    """Return the hours until the last unit ends, where a free worker takes the largest that is left."""
    free = [0.0] * min(workers, len(hours))
    for unit in sorted(hours, reverse=True):
        heapq.heapreplace(free, free[0] + unit)
    return max(free)


def main() -> None:
    """Print one row for each division."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file-bytes", type=float, default=300e6)
    parser.add_argument("--workers", type=int, default=1000)
    arguments = parser.parse_args()
    parts, units, files = [], [], 0
    for corpus in OPEN_CORPORA:
        count = math.ceil(corpus.text_bytes / COMPRESSION / arguments.file_bytes)
        listing = [SourceFile(f"{number:06d}", int(arguments.file_bytes), None) for number in range(count)]
        files += count
        units += [text for _, text in divide_files(listing, corpus.text_bytes, UNIT_TEXT_BYTES)]
        shards = 64 if corpus.kind == "text" else 16
        parts += [corpus.text_bytes / shards] * shards
    print(
        f"{files:,} files, {sum(units) / 1e12:.1f} TB of text, {arguments.workers:,} workers, {MEASURED.clean} MB/s\n"
    )
    print("| division | units | largest, GB of text | longest unit, h | all units, h |\n|---|--:|--:|--:|--:|")
    for name, sizes in (("64 and 16 parts", parts), ("2 GB of text", units)):
        hours = [size / 1e6 / MEASURED.clean / 3600 for size in sizes]
        cells = (name, f"{len(sizes):,}", f"{max(sizes) / 1e9:.1f}", f"{max(hours):.1f}")
        print(f"| {' | '.join(cells)} | {schedule(hours, arguments.workers):.1f} |")


if __name__ == "__main__":
    main()
