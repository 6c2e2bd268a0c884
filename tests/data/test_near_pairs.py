"""Pairs of near duplicates are those of datatrove's own search, for any units and ranges, with few open files."""

import resource
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from datatrove.pipeline.dedup import MinhashDedupBuckets
from hypothesis import given, settings
from hypothesis import strategies as st

from data.compat import LocalFolder
from data.filters import dedup, near_pairs
from data.filters.near_pairs import HASH_END, MINHASH, SIGNATURE, draw_bounds, list_signatures, read_range

FIRST_HASHES = [0, 1, 5, HASH_END - 2]
"""First hashes of the signatures; the last one is the largest that occurs."""
VALUES = st.integers(0, 2 * len(FIRST_HASHES) - 1)
UNITS = st.lists(
    st.none() | st.lists(st.none() | st.tuples(VALUES, VALUES), max_size=6), min_size=1, max_size=6
).filter(lambda units: any(unit is not None for unit in units))
"""Units, None where one has no group, of documents, None where one has no signature. A document's two values decide its
signatures in the even and in the odd buckets, so that it may be the duplicate of different ones."""


def write_signatures(group: Path, unit: int, bucket: int, rows: np.ndarray) -> None:
    path = group / f"signatures/bucket_{bucket:03d}/{unit:05d}.minhash.sig"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows[np.lexsort((rows["document"], *rows["hashes"].T[::-1]))].tobytes())


def make_rows(first_hashes: np.ndarray) -> np.ndarray:
    rows = np.zeros(len(first_hashes), SIGNATURE)
    rows["hashes"][:, 0], rows["document"] = first_hashes, np.arange(len(first_hashes))
    return rows


def write_units(group: Path, units: list[list[tuple[int, int] | None] | None]) -> None:
    """Write the signatures of all buckets; two values of one first hash differ in the last one."""
    for unit, documents in enumerate(units):
        for bucket in range(MINHASH.num_buckets if documents is not None else 0):
            values = [(position, both[bucket % 2]) for position, both in enumerate(documents) if both is not None]
            hashes = [[FIRST_HASHES[value % len(FIRST_HASHES)], *[7] * 6, value] for _, value in values]
            rows = np.zeros(len(values), SIGNATURE)
            if values:
                rows["hashes"], rows["document"] = hashes, [position for position, _ in values]
            write_signatures(group, unit, bucket, rows)


def find_removed(folder: Path) -> dict[str, bytes]:
    """Cluster the pairs of the group `all` and return the content of each list of documents to remove."""
    block, labels = dedup.make_near_cluster(folder, ["all"])
    block.run(None, 0, len(labels))
    return {path.name: path.read_bytes() for path in (folder / "remove").glob("*")}


def read_pairs(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((folder / "all/pairs").iterdir()))


@given(UNITS, st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_pairs_and_removed_documents_are_those_of_datatrove(units, range_rows):
    with tempfile.TemporaryDirectory() as name, patch.object(near_pairs, "SAMPLE", 50):
        ours, theirs = Path(name) / "ours", Path(name) / "theirs"
        for folder in (ours, theirs):
            write_units(folder / "all", units)
        block, labels = dedup.make_near_buckets(ours, ["all"], range_rows)
        for task in range(len(labels)):
            block.run(None, task, len(labels))
        folders = [LocalFolder(theirs / "all" / kind) for kind in ("signatures", "pairs")]
        for bucket in range(MINHASH.num_buckets):
            MinhashDedupBuckets(*folders, config=MINHASH).run(None, bucket, MINHASH.num_buckets)
        assert read_pairs(ours) == read_pairs(theirs)
        assert find_removed(ours) == find_removed(theirs)


def test_ranges_hold_equal_shares_of_uneven_hashes(tmp_path):
    """Minima over many n-grams are small: equal parts of the numbers would leave nearly all rows to the first range."""
    rng = np.random.default_rng(0)
    for unit, length in enumerate([30, 30, 300, 300, 3000, 3000]):
        minima = HASH_END * (1 - rng.random(5000) ** (1 / length))
        write_signatures(tmp_path, unit, 0, make_rows(minima.astype(np.uint64)))
    paths = list_signatures(tmp_path, 0)
    bounds = draw_bounds(paths, 8)
    shares = [sum(len(read_range(path, bounds[i], bounds[i + 1])) for path in paths) for i in range(8)]
    assert sum(shares) == 30_000
    assert shares == pytest.approx([30_000 / 8] * 8, rel=0.1)


def test_a_task_opens_one_file_at_a_time(tmp_path):
    """300 units, where the limit on open files leaves room for some 20."""
    for unit in range(300):
        for bucket in range(MINHASH.num_buckets):
            write_signatures(tmp_path / "all", unit, bucket, make_rows(np.array([unit // 2, unit + 1000], np.uint64)))
    block, labels = dedup.make_near_buckets(tmp_path, ["all"], 200)
    assert len(labels) == 3 * MINHASH.num_buckets
    assert labels[4] == "bucket 1 of all, range 2 of 3"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, _list_open())) + 20, limits[1]))
    try:
        for task in range(3):
            block.run(None, task, len(labels))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    pairs = np.frombuffer(read_pairs(tmp_path), np.uint32).reshape(-1, 4)
    assert pairs.tolist() == [[unit, 0, unit + 1, 0] for unit in range(0, 300, 2)]


def _list_open() -> list[str]:
    return [path.name for path in Path("/proc/self/fd").iterdir()]
