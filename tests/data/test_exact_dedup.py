"""Of equal texts one is kept: the same as by a plain search and by datatrove's blocks, for any units and ranges."""

import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import ExactDedupFilter, ExactDedupSignature, ExactFindDedups
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue.corpora import CATALOGUE
from data.filters import exact_dedup
from data.filters.cell_files import count_rows, read_cells, write_cells
from data.filters.exact_dedup import CELLS, SIGNATURE, ExactFilter, ExactFind, ExactSignature

CORPORA = [replace(CATALOGUE["c4-sample"], name=name) for name in ("first", "second", "third")]
METADATA = {"kind": "text"}
UNITS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.sampled_from("abcdefghij"), max_size=8)), min_size=1).map(
    lambda found: sorted(found, key=lambda unit: unit[0])  # units come in the order of their corpora
)
HASHES = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**52 - 1, 2**52, 2**63, 2**64 - 1]))


def make_documents(texts: list[str], corpus: int) -> list[Document]:
    return [
        Document(text=text, id=str(i), metadata=METADATA | {"corpus": CORPORA[corpus].name})
        for i, text in enumerate(texts)
    ]


def keep_by_search(found: list[tuple[int, list]]) -> list[list[int]]:
    """Return the positions that are kept of each unit: of equal texts the lowest (corpus, position, unit)."""
    places = [(text, corpus, position, unit) for unit, (corpus, texts) in enumerate(found)
              for position, text in enumerate(texts)]  # fmt: skip
    best: dict = {}
    for text, *place in sorted(places, key=lambda place: place[1:]):
        best.setdefault(text, place)
    return [sorted(position for _, position, unit in best.values() if unit == rank) for rank in range(len(found))]


def keep(folder: Path, found: list[tuple[int, list[str]]], ranges: int) -> list[list[int]]:
    """Return the positions that the blocks keep of each unit."""
    for rank, (corpus, texts) in enumerate(found):
        ExactSignature(folder).run(make_documents(texts, corpus), rank, len(found))
    for number in range(ranges):
        ExactFind(folder, [corpus for corpus, _ in found]).run(None, number, ranges)
    block = ExactFilter(folder, len(found), ranges)
    return [
        [int(document.id) for document in block.run(make_documents(texts, corpus), rank, len(found))]
        for rank, (corpus, texts) in enumerate(found)
    ]


def keep_by_datatrove(folder: Path, found: list[tuple[int, list[str]]]) -> list[list[int]]:
    """Return the positions that datatrove's blocks keep of each unit, with priorities in the order of the corpora."""

    def get_text(document: Document) -> str:
        return document.text

    names = [corpus.name for corpus in CORPORA]
    config = ExactDedupConfig(get_text, lambda document: 9 - names.index(document.metadata["corpus"]))
    for rank, (corpus, texts) in enumerate(found):
        ExactDedupSignature(str(folder / "s"), config).run(make_documents(texts, corpus), rank, len(found))
    ExactFindDedups(str(folder / "s"), str(folder / "d"), config).run(None, 0, 1)
    return [
        [
            int(document.id)
            for document in ExactDedupFilter(str(folder / "d"), config).run(make_documents(texts, corpus), rank)
        ]
        for rank, (corpus, texts) in enumerate(found)
    ]


@settings(max_examples=60, deadline=None)
@given(UNITS, st.integers(1, 7))
def test_the_copy_in_the_first_corpus_is_kept(found, ranges):
    with tempfile.TemporaryDirectory() as folder:
        assert keep(Path(folder), found, ranges) == keep_by_search(found)


@settings(max_examples=25, deadline=None)
@given(UNITS, st.integers(1, 3))
def test_datatrove_keeps_the_same(found, ranges):
    # Among documents at one position of several units of a corpus, datatrove's choice follows from its heap.
    def place(kept: list[list[int]]) -> Counter:
        return Counter(
            (corpus, position, texts[position])
            for (corpus, texts), positions in zip(found, kept, strict=True)
            for position in positions
        )

    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        assert place(keep(Path(ours), found, ranges)) == place(keep_by_datatrove(Path(theirs), found))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(HASHES, max_size=6)), min_size=1).map(
        partial(sorted, key=lambda unit: unit[0])
    ),
    st.sampled_from([1, 2, 3, 64, CELLS]),
)
def test_every_hash_is_in_one_range(found, ranges):
    """Written and found by hashes alone, with those at the borders of cells among them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for rank, (_, hashes) in enumerate(found):
            exact_dedup.write_signatures(folder, rank, np.array(hashes, np.uint64))
        block = ExactFind(folder, [corpus for corpus, _ in found])
        for number in range(ranges):
            block.run(None, number, ranges)
        last = ExactFilter(folder, len(found), ranges)
        kept = [
            [int(document.id) for document in last.run(make_documents(["text"] * len(hashes), corpus), rank)]
            for rank, (corpus, hashes) in enumerate(found)
        ]
    assert kept == keep_by_search(found)


def test_the_number_of_ranges_follows_from_the_hashes(tmp_path):
    for rank, number in enumerate((5, 0, 6)):
        exact_dedup.write_signatures(tmp_path, rank, np.arange(number, dtype=np.uint64))
    assert [exact_dedup.count_ranges(tmp_path, 3, size) for size in (100, 11, 10, 4, 1)] == [1, 1, 2, 3, 11]
    assert exact_dedup.count_ranges(tmp_path, 1, 1) == 5


def test_a_repetition_of_one_unit_is_one_hash(tmp_path):
    """A text that a corpus has a billion times would else be a billion rows of one range."""
    exact_dedup.write_signatures(tmp_path, 0, np.array([7, 9, 7, 7], np.uint64))
    path = tmp_path / "hashes/00000"
    assert count_rows(path, SIGNATURE, CELLS) == 2
    assert read_cells(path, SIGNATURE, CELLS, 0, CELLS).tolist() == [(7, 0), (9, 1)]


def test_cells_are_read_without_the_others(tmp_path):
    rows = np.arange(6, dtype=np.uint16)
    write_cells(tmp_path / "c", rows, np.array([0, 0, 2, 2, 2, 4]), 5)
    read = [read_cells(tmp_path / "c", rows.dtype, 5, *cells).tolist() for cells in ((0, 1), (1, 2), (1, 4), (0, 5))]
    assert read == [[0, 1], [], [2, 3, 4], [0, 1, 2, 3, 4, 5]]


def test_a_document_that_is_missing_later_is_an_error(tmp_path):
    found = [(0, ["a", "b", "b"])]
    keep(tmp_path, found, 1)
    block = ExactFilter(tmp_path, 1, 1)
    with np.testing.assert_raises_regex(AssertionError, "fewer documents"):
        list(block.run(make_documents(["a"], 0), 0, 1))
