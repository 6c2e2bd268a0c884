"""Near duplicates are sought in the groups that were asked for, and nowhere else."""

from dataclasses import replace

import pytest
from datatrove.data import Document

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
from data.filters import dedup
from tests.data.planted import page

BOOKS = replace(CATALOGUE["c4-sample"], name="books", shards=2)
WEB, NOTHING = (replace(BOOKS, name=name, shards=1) for name in ("web", "nothing"))
UNITS = [Unit(BOOKS, "", 0, 0), Unit(BOOKS, "", 1, 0), Unit(WEB, "", 0, 0), Unit(NOTHING, "", 0, 0)]


def near(number: int) -> str:
    return page(number).replace("The ", "Our ", 1)


TEXTS = [
    [page(1), page(2), near(1)],  # repeats itself
    [near(2), page(3)],  # repeats the shard before
    [page(3), near(3), page(4)],  # repeats the other corpus, and itself
    [],  # nothing was left of it
]


@pytest.mark.parametrize(("within", "kept"), [("all", 4), ("corpus", 5)])
def test_duplicates_are_removed_within_their_group(tmp_path, within, kept):
    groups = dedup.assign_near_groups(UNITS, within)
    documents = [[Document(text=text, id=str(i)) for i, text in enumerate(texts)] for texts in TEXTS]
    for rank, found in enumerate(documents):
        dedup.make_near_signature(tmp_path, groups).run(found, rank, len(UNITS))
    for block, labels in (dedup.make_near_buckets(tmp_path, groups), dedup.make_near_cluster(tmp_path, groups)):
        for rank in range(len(labels)):
            block.run(None, rank, len(labels))
    left = [
        [document.text for document in dedup.make_near_filter(tmp_path).run(found, rank, len(UNITS))]
        for rank, found in enumerate(documents)
    ]
    assert sum(map(len, left)) == kept
    assert page(4) in left[2]


def test_a_deduplicated_corpus_is_not_searched(tmp_path):
    published = replace(BOOKS, deduplicated="by its publisher")
    units = [Unit(published, "", 0, 0), Unit(WEB, "", 0, 0)]
    groups = dedup.assign_near_groups(units, "all")
    assert groups == [None, "all"]
    documents = [Document(text=text, id=str(i)) for i, text in enumerate((page(1), page(1)))]
    dedup.make_near_signature(tmp_path, groups).run(documents, 0, 2)
    assert not list(tmp_path.rglob("*.sig"))
    nothing = dedup.assign_near_groups(units[:1], "all")
    assert dedup.make_near_buckets(tmp_path, nothing)[1] == dedup.make_near_cluster(tmp_path, nothing)[1] == []
