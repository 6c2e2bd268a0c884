"""Remote files: listed and tried before the first step, divided into units, tried again, read as they were listed."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import requests
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from core.errors import DamagedData, RefusedInput
from core.progress import ignore_progress
from data import sources
from data.catalogue.corpus import Corpus, Installed, RemoteFiles
from data.pipeline import prepare
from data.readers import remote_files, remote_readers, retries
from data.readers.retries import is_transient, retry
from data.sources import SourceFile, divide_files, freeze_sources, list_units
from tests.data import planted


def make_corpus(folder, name="r", pattern="*.jsonl", columns=("text",), text_bytes=100):
    source = RemoteFiles(str(folder), pattern, columns)
    return Corpus(name, "web", "text", "prose", "test", source, remote_readers.read_text, text_bytes)


def write(folder: Path, name: str, *texts: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@given(sizes=st.lists(st.integers(0, 50), min_size=1), limit=st.integers(1, 60), ratio=st.integers(1, 4))
def test_units_hold_every_file_once_in_order_and_no_more_than_their_limit(sizes, limit, ratio):
    files = [SourceFile(f"{number:03d}", size, None) for number, size in enumerate(sizes)]
    groups = divide_files(files, ratio * sum(sizes), limit)
    assert [path for paths, _ in groups for path in paths] == [file.path for file in files]
    text = {file.path: ratio * file.bytes for file in files}
    for (paths, size), (following, _) in zip(groups, [*groups[1:], ((), 0)], strict=True):
        assert size == sum(text[path] for path in paths)
        assert size <= limit or len(paths) == 1
        assert not following or size + text[following[0]] > limit, "no unit is smaller than it could be"


def test_a_corpus_at_published_size_has_units_of_an_hour():
    files = [SourceFile(f"part-{number:05d}", 500_000_000, None) for number in range(12_000)]
    groups = divide_files(files, int(16.7e12), sources.UNIT_TEXT_BYTES)
    assert len(groups) == 12_000, "a file of 1.4 GB of text each"
    groups = divide_files([replace(file, bytes=50_000_000) for file in files], int(1.67e12), sources.UNIT_TEXT_BYTES)
    assert {len(paths) for paths, _ in groups} == {14, 2} and max(size for _, size in groups) <= 2e9


def test_the_list_is_made_once(tmp_path, monkeypatch):
    write(tmp_path / "a", "1.jsonl", "one")
    corpus, path = make_corpus(tmp_path / "a"), tmp_path / "work/sources.json"
    found = freeze_sources([corpus], path, ignore_progress)
    write(tmp_path / "a", "2.jsonl", "two")
    monkeypatch.setattr(sources, "match_corpus", None)
    assert freeze_sources([corpus], path, ignore_progress) == found
    (unit,) = list_units([corpus], {}, 0, found)
    assert [record["text"] for record in corpus.read(unit)] == ["one"]
    assert (unit.text_bytes, unit.parts) == (100, 1)


def test_all_that_is_wrong_is_named_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "WAITS", ())
    write(tmp_path / "good", "1.jsonl", "one")
    write(tmp_path / "column", "1.jsonl", "one")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.parquet").write_bytes(b"PAR1 and no more")
    corpora = [
        make_corpus(tmp_path / "good", "good"),
        make_corpus(tmp_path / "column", "column", columns=("content",)),
        make_corpus(tmp_path / "nothing", "nothing"),
        make_corpus(tmp_path / "damaged", "damaged", pattern="*"),
    ]
    with pytest.raises(RefusedInput) as refused:
        freeze_sources(corpora, tmp_path / "sources.json", ignore_progress)
    lines = str(refused.value).splitlines()
    assert lines[0].startswith("3 of 4 remote corpora cannot be read; correct the address, the columns or the access")
    assert "column: " in lines[1] and "content" in lines[1] and "1.jsonl" in lines[1]
    assert "nothing finds no '*.jsonl'" in lines[2]
    assert "damaged: " in lines[3] and "a.parquet" in lines[3]
    assert not (tmp_path / "sources.json").exists()


def test_a_store_that_does_not_answer_is_said_once(tmp_path, monkeypatch):
    asked = []

    def fail(fs, root, pattern):
        asked.append(root)
        raise requests.ConnectionError("no route to the hub")

    monkeypatch.setattr(retries, "WAITS", (0.0,))
    monkeypatch.setattr(remote_files, "match_files", fail)
    corpora = [make_corpus(tmp_path, "first"), make_corpus(tmp_path, "second")]
    with pytest.raises(RefusedInput, match=r"(?s)1 of 2 .*when the store answers.*first: cannot be listed: .*no route"):
        freeze_sources(corpora, tmp_path / "sources.json", ignore_progress)
    assert len(asked) == 2, "tried again once, and the second corpus not at all"


def test_a_damaged_file_among_good_ones_is_left_to_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "WAITS", ())
    write(tmp_path / "a", "good.jsonl", "one")
    (tmp_path / "a/cut.jsonl").write_text('{"te')
    (tmp_path / "a/empty.jsonl").touch()
    assert len(freeze_sources([make_corpus(tmp_path / "a")], tmp_path / "sources.json", ignore_progress)["r"]) == 3


def test_a_wrong_column_ends_the_data_step_at_once(tmp_path, monkeypatch):
    source, _ = planted.write_inputs(tmp_path)
    planted.plant(monkeypatch, source)
    for path in (source / "mirror").glob("*.jsonl"):
        path.write_text(path.read_text().replace('"text"', '"content"'))
    with pytest.raises(RefusedInput, match=r"mirror: .*has no column 'text'"):
        prepare(planted.CONFIG, packages={}, benchmark_texts=None, out=tmp_path / "out", progress=ignore_progress)
    assert not (tmp_path / "out/work/logs").exists()


def test_a_file_that_changes_after_it_was_listed_is_named_in_the_manifest(tmp_path, monkeypatch):
    source, _ = planted.write_inputs(tmp_path)
    planted.plant(monkeypatch, source)
    listed = sources.freeze_sources

    def list_and_change(*arguments):
        found = listed(*arguments)
        with (source / "mirror/a.jsonl").open("a") as file:
            file.write(json.dumps({"text": planted.page(999)}) + "\n")
        return found

    monkeypatch.setattr("data.pipeline.freeze_sources", list_and_change)
    made = prepare(planted.CONFIG, packages={}, benchmark_texts=None, out=tmp_path / "out", progress=ignore_progress)
    assert made["keys"]["corpora"] == {}, "keys are of files as they were listed"
    changed = {name: entry.get("changed_inputs") for name, entry in made["corpora"].items()}
    assert changed["planted"] == [] and changed["mirror"] == [os.path.realpath(source / "mirror/a.jsonl")]


class BreakingFile(io.BytesIO):
    """Content of a file whose connection breaks once, in the middle."""

    def __init__(self, path: str, content: bytes):
        super().__init__(content)
        self.path = path

    def readinto(self, buffer):
        if self.tell() > 0 and self.path not in FlakyFileSystem.broken:
            FlakyFileSystem.broken.add(self.path)
            raise requests.ConnectionError("reset by peer")
        return super().readinto(memoryview(buffer)[:50_000])

    def read(self, size=-1):
        buffer = bytearray(size if size >= 0 else len(self.getvalue()))
        return bytes(buffer[: self.readinto(buffer)])


class FlakyFileSystem(MemoryFileSystem):
    """A store whose connections break, once for each file."""

    protocol = "flaky"
    broken: ClassVar[set[str]] = set()

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        return BreakingFile(path, file.getvalue()) if mode == "rb" else file


def test_rows_go_on_behind_those_that_were_read(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0.0, 0.0))
    FlakyFileSystem.broken.clear()
    fs = FlakyFileSystem()
    texts = [f"row {number} " + "x" * 200 for number in range(3000)]
    fs.pipe("/rows.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    try:
        rows = list(remote_files.read_file(fs, "/rows.jsonl", ("text",), ("text",)))
        assert [row["text"] for row in rows] == texts and FlakyFileSystem.broken == {"/rows.jsonl"}
        FlakyFileSystem.broken.clear()
        monkeypatch.setattr(retries, "WAITS", ())
        with pytest.raises(DamagedData, match=r"/rows\.jsonl cannot be read .*reset by peer"):
            list(remote_files.read_file(fs, "/rows.jsonl", ("text",), ("text",)))
    finally:
        fs.rm("/rows.jsonl")


def answer(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True), (TimeoutError(), True), (answer(429), True), (answer(503), True),
        (requests.exceptions.ChunkedEncodingError(), True), (requests.ConnectionError(), True),
        (requests.ReadTimeout(), True), (answer(403), False), (answer(404), False),
        (FileNotFoundError(), False), (PermissionError(), False), (ValueError(), False),
    ],
)  # fmt: skip
def test_only_what_may_pass_is_tried_again(error, transient, monkeypatch):
    assert is_transient(error) == transient
    wrapped = OSError("the store's package wraps it")
    wrapped.__cause__ = error
    assert is_transient(wrapped) == transient
    waited, calls = [], []
    monkeypatch.setattr(retries.time, "sleep", waited.append)

    def fail():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        retry(fail, "x")
    assert waited == (list(retries.WAITS) if transient else []) and len(calls) == len(waited) + 1


def test_a_corpus_without_files_keeps_its_shards():
    corpus = Corpus("g", "web", "text", "prose", "test", Installed(("python",)), remote_readers.read_text, 90, shards=3)
    units = list_units([corpus], {}, 5, {})
    assert [(unit.shard, unit.parts, unit.text_bytes, unit.files) for unit in units] == [
        (number, 3, 30, None) for number in range(3)
    ]
    assert units[2].label == "g.00002"
