"""A path is a name: below folders with the characters of patterns, addresses and options, the data is the same."""

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from datatrove.data import Document

from data.catalogue.corpus import Corpus, RemoteFiles, Unit
from data.compat import LocalFolder, count_completed_ranks, list_incomplete_ranks
from data.execution import LocalExecutor
from data.filters import dedup
from data.filters.exact_dedup import ExactFilter, ExactFind, ExactSignature
from data.pipeline import prepare
from data.readers import package_readers, remote_files, remote_readers
from data.tokens.existing_tokenizer import load_existing
from data.tokens.verify_shards import verify_shards
from tests.data import planted

NAMES = (
    "x [v1]", "[/x]", "a*b", "q?", "{a,b}", "**", "a::b", "s3:x", "file:x", "%20", "%j", "#1", "~", "-n", "two  spaces",
    "end ", "größe", "line\nbreak", "back\\slash", "it's", "$HOME", "[!x]", "a&b;c", "zip::x",
)  # fmt: skip
NOT_UTF_8 = os.fsdecode(b"latin-1 \xff")
"""A name that files and addresses may have; only the tokenizer's folder may not, for `tokenizers` takes it as UTF-8."""


def run_block(block, rank: int = 0, documents: list[Document] | None = None) -> list[Document]:
    """Run one block of datatrove as one of three tasks, in this process."""
    return list(block.run(documents, rank, 3) or ())


def count_duplicates(folder: Path) -> tuple[int, int]:
    """Return the exact and the near duplicates that the blocks find among 20 documents when they write to `folder`."""
    pages = [planted.page(number) for number in range(10)]
    texts = [pages + pages[:4], [page.replace("The ", "Our ", 1) for page in pages[4:7]], pages[9:]]
    ranks = [[Document(text, id=text[:9], metadata={"corpus": "c", "kind": "text"}) for text in rank] for rank in texts]
    exact, near, groups = folder / "exact", folder / "near", ["all"] * 3
    for rank, documents in enumerate(ranks):
        run_block(ExactSignature(exact), rank, documents)
        run_block(dedup.make_near_signature(near, groups), rank, documents)
    ExactFind(exact, [0, 0, 0]).run(None, 0, 1)
    for block, labels in (dedup.make_near_buckets(near, groups), dedup.make_near_cluster(near, groups)):
        for task in range(len(labels)):
            block.run(None, task, len(labels))
    total = sum(map(len, ranks))
    kept = [
        sum(len(run_block(block, rank, documents)) for rank, documents in enumerate(ranks))
        for block in (ExactFilter(exact, 3, 1), dedup.make_near_filter(near))
    ]
    return total - kept[0], total - kept[1]


@pytest.mark.parametrize("name", ["plain", *NAMES, NOT_UTF_8])
def test_duplicates_are_found_below_a_folder_of_any_name(tmp_path, name):
    assert count_duplicates(tmp_path / name) == (5, 8)


@pytest.mark.parametrize("name", [*NAMES, NOT_UTF_8])
@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_lists_and_keeps_its_files_under_any_name(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    folder = pickle.loads(pickle.dumps(LocalFolder(name if relative else tmp_path / name)))
    with folder.open("sub/a.txt", "wt") as file:
        file.write("text")
    assert (tmp_path / name / "sub/a.txt").read_text() == "text"
    assert folder.list_files() == folder.list_files("sub") == folder.list_files(glob_pattern="*/*.txt") == ["sub/a.txt"]
    assert folder.list_files(glob_pattern="*.txt") == []
    executor = LocalExecutor([], 2, 1, Path(name) if relative else tmp_path / name)
    executor.mark_rank_as_completed(1)
    assert (list_incomplete_ranks(executor), count_completed_ranks(tmp_path / name)) == ([0], 1)


@pytest.mark.parametrize("name", [*NAMES, NOT_UTF_8])
@pytest.mark.parametrize("relative", [False, True])
def test_an_address_is_no_pattern_and_its_files_have_any_name(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "data").mkdir(parents=True)
    (tmp_path / name / "data" / f"{name.replace('/', '')}.jsonl").write_text('{"text": "here"}\n')
    # Neighbours that the name would match if it were a pattern.
    for other in ("x v", "aXb", "q1", "y"):
        (tmp_path / other / "data").mkdir(parents=True)
        (tmp_path / other / "data/b.jsonl").write_text('{"text": "a neighbour"}\n')
    address = name if relative else str(tmp_path / name)
    corpus = Corpus(
        "r", "web", "text", "prose", "test", RemoteFiles(address, "data/*.jsonl"), remote_readers.read_text, 1
    )
    unit = Unit(corpus, address, 0, 0)
    assert [record["text"] for record in corpus.read(unit)] == ["here"]
    (named,) = remote_files.list_inputs(unit)
    assert named["path"] == os.path.realpath(tmp_path / name / "data" / f"{name.replace('/', '')}.jsonl")


def test_below_all_these_folders_at_once_the_data_is_the_same(prepared, tmp_path, monkeypatch):
    folder = tmp_path.joinpath(*(name.strip("/") for name in NAMES))
    shutil.copytree(prepared.source, folder / "source")
    texts = Path(shutil.copy(prepared.benchmark_texts, folder / "texts #1?.jsonl"))
    planted.plant(monkeypatch, folder / "source")
    found = prepare(planted.CONFIG, packages={}, benchmark_texts=texts, out=folder / "out", progress=lambda *_: None)

    def leave_out_paths(manifest: dict) -> dict:
        keep = {name: value for name, value in manifest.items() if name not in ("plan", "keys")}
        corpora = {
            name: {key: value for key, value in entry.items() if key not in ("address", "inputs")}
            for name, entry in keep["corpora"].items()
        }
        return keep | {"corpora": corpora}

    assert leave_out_paths(found) == leave_out_paths(prepared.manifest)
    verify_shards(folder / "out")
    loaded = load_existing(str(folder / "out/tokenizer"), "")
    assert len(loaded) == planted.CONFIG.tokenizer.train_vocab_size


@pytest.mark.parametrize("name", [*NAMES, NOT_UTF_8])
def test_a_package_is_read_out_of_a_folder_of_any_name(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / name / "p.whl", "w") as archive:
        archive.writestr("p/a.txt", "one")
    assert package_readers.read_archive_members(str(tmp_path / name / "p.whl"), "p/a.txt") == {"p/a.txt": b"one"}
