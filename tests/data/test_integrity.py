"""Full disks, two writers, changed files: found, named, and mended by running again."""

import fcntl
import json
import multiprocessing
import os
import resource
import shutil
from pathlib import Path

import pytest
from datatrove.data import Document

from core.errors import DamagedData, RefusedInput
from data.folder_lock import lock_folder
from data.pipeline import prepare
from data.tokens import mds
from data.tokens.shard_writer import ShardWriter
from data.tokens.verify_shards import verify_shards
from tests.data.planted import CONFIG, Preparation, page, plant


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    shutil.copytree(prepared.out, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_finished_folder_and_its_copy_verify(prepared: Preparation, copy: Path):
    found = verify_shards(copy)
    entries = [e for top in ("shards", "heldout") for s in prepared.manifest[top].values() for e in s.values()]
    assert found["domains"] == len(entries)
    assert found["shards"] == sum(entry["shards"] for entry in entries)
    assert found["bytes"] == sum(entry["compressed_bytes"] for entry in entries)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("pattern", ["index.json", "planted-*.00000.mds.zstd"])
@pytest.mark.parametrize(("damage", "said"), [(flip, "is damaged"), (Path.unlink, "is missing")])
def test_a_changed_or_missing_file_is_named(copy, pattern, damage, said):
    (file,) = (copy / "shards/pretrain/web").glob(pattern)
    damage(file)
    with pytest.raises(DamagedData, match=rf"shards/pretrain/web/{file.name} {said}"):
        verify_shards(copy)


def test_a_file_too_many_and_a_folder_without_manifest_are_refused(copy):
    (copy / "shards/sft/tool_use/shard.00099.mds.zstd").write_bytes(b"")
    with pytest.raises(DamagedData, match=r"shard\.00099.* are not in index\.json"):
        verify_shards(copy)
    (copy / "data_manifest.json").unlink()
    with pytest.raises(RefusedInput, match="not a finished data step"):
        verify_shards(copy)


def test_a_second_writer_of_one_folder_is_refused_and_disturbs_nothing(prepared, tmp_path, monkeypatch):
    plant(monkeypatch, prepared.source)
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RefusedInput, match="is being written by another process"):
            prepare(CONFIG, packages={}, benchmark_texts=prepared.benchmark_texts, out=out, progress=lambda *_: None)
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("third_writer", [False, True])
def test_the_lock_of_a_writer_that_ended_meanwhile_lets_no_two_in(tmp_path, monkeypatch, third_writer):
    """Between our open and our lock, the other process removes the file, and perhaps a third one makes a new one."""
    lock_file = fcntl.flock

    def lock_a_removed_file(file, operation: int) -> None:
        (tmp_path / ".lock").unlink()
        if third_writer:
            (tmp_path / ".lock").touch()
        lock_file(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_a_removed_file)
    with pytest.raises(RefusedInput, match="is being written by another process"), lock_folder(tmp_path):
        pytest.fail("two processes write to one folder")
    monkeypatch.undo()
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not (tmp_path / ".lock").exists()


def _write_with_little_room(folder: Path, parts: Path, result) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
    metadata = {"corpus": "c", "domain": "web", "kind": "text", "split": "pretrain"}
    documents = [Document(text=page(number), id=str(number), metadata=metadata) for number in range(400)]
    try:
        ShardWriter(folder, parts, parts / "set_aside", ["c.00000"], 1 << 16, 8192).run(documents, 0, 1)
        result.put("written")
    except OSError as error:
        result.put(os.strerror(error.errno))


def test_a_disk_full_among_shards_leaves_no_part_that_looks_whole(prepared, tmp_path):
    context = multiprocessing.get_context("fork")
    result = context.Queue()
    worker = context.Process(target=_write_with_little_room, args=(prepared.out / "tokenizer", tmp_path, result))
    worker.start()
    assert result.get(timeout=60) == "File too large"
    worker.join()
    assert [path.name for path in tmp_path.iterdir()] == ["00000.partial"]
    # The next try begins again, and its part is whole.
    metadata = {"corpus": "c", "domain": "web", "kind": "text", "split": "pretrain"}
    ShardWriter(prepared.out / "tokenizer", tmp_path, tmp_path / "set_aside", ["c.00000"], 1 << 16, 8192).run(
        [Document(text=page(0), id="0", metadata=metadata)], 0, 1
    )
    assert mds.assemble([("c", tmp_path / "00000")], tmp_path / "out", "shards/pretrain/web", "v")["shards"] == 1


def test_the_page_shows_what_the_manifest_counts_and_needs_nothing_else(prepared):
    page_text = (prepared.out / "statistics.html").read_text()
    for stage, domains in prepared.manifest["shards"].items():
        assert f"shards/{stage}" in page_text
        for entry in domains.values():
            assert f"{entry['tokens']:,}" in page_text
    for name in prepared.manifest["corpora"]:
        assert name in page_text
    assert "bakery" in page_text
    assert page_text.count('<div class="sample">') >= 20
    assert not any(reference in page_text for reference in (" src=", "<link", "@import", "url("))


def test_counted_rows_add_up(prepared):
    for name, entry in prepared.manifest["corpora"].items():
        dropped = sum(sum(flow["dropped"].values()) for flow in entry["filters"].values())
        gone = entry["malformed"] + dropped + entry["exact_duplicates"] + entry["near_duplicates"]
        gone += sum(entry["contaminated"].values()) + sum(entry["too_slow"].values())
        assert entry["read"] == gone + entry["kept"], name
        assert json.dumps(entry)
