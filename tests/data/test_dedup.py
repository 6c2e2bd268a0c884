"""Near duplicates are sought in the groups that were asked for, and nowhere else."""

import resource
from dataclasses import replace

import pytest
from datatrove.data import Document

from core.errors import RefusedInput
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
from data.filters import dedup
from data.filters.open_files import SPARE, allow_open_files
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


@pytest.fixture
def limits():
    """Give this process's limits on open files, and set the soft one as it was when the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield soft, hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_task_may_open_the_signatures_of_all_units(tmp_path, limits):
    """300 units, where the limit was 256 files: as 2,000 are where it is 1,024."""
    _, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    (tmp_path / "all/signatures/bucket_000").mkdir(parents=True)
    for unit in range(300):
        (tmp_path / f"all/signatures/bucket_000/{unit:05d}.minhash.sig").touch()
    block, labels = dedup.make_near_buckets(tmp_path, ["all"] * 300)
    block.run(None, 0, len(labels))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300 + SPARE, hard)
    allow_open_files(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300 + SPARE, hard), "never lowered"


def test_a_limit_that_cannot_be_raised_is_refused(limits, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(
        RefusedInput, match=r"near_duplicates_within: .* opens 5000 files .* is 4096 .* raise it to 5256"
    ):
        allow_open_files(5000)
