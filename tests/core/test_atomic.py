"""Tests of core.atomic: outputs appear complete or not at all."""

import json
import os
import subprocess
import sys
import threading

import pytest

from core import atomic


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "file"
    for content in ("old", "new"):
        with atomic.atomic_write(path) as partial:
            assert partial == atomic.partial_path(path) and not partial.exists()
            partial.write_text(content)
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file"]


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic.atomic_write(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert path.read_text() == "old"


@pytest.mark.parametrize("keep", [False, True])
def test_a_partial_folder_is_resumed_only_where_asked(tmp_path, keep):
    path = tmp_path / "folder"
    atomic.partial_path(path).mkdir()
    (atomic.partial_path(path) / "finished-part").touch()
    with atomic.atomic_write(path, keep_partial=keep) as partial:
        partial.mkdir(exist_ok=True)
    assert os.listdir(path) == (["finished-part"] if keep else [])


def test_a_folder_that_holds_files_is_not_replaced(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(OSError), atomic.atomic_write(path) as partial:
        partial.mkdir()
    assert os.listdir(path) == ["kept"]


def test_concurrent_writers_never_show_a_part(tmp_path):
    path = tmp_path / "value.json"
    values = [[number] * 20_000 for number in range(4)]
    atomic.write_json(path, values[0])
    threads = [threading.Thread(target=lambda value=value: atomic.write_json(path, value)) for value in values * 5]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert json.loads(path.read_text()) in values
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic.write_text(path, "old")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_remove_takes_files_links_and_folders(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic.remove(link)
    assert os.listdir(tmp_path) == ["target"] and os.listdir(target) == ["file"]
    atomic.remove(target)
    atomic.remove(target)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    """A process that is killed inside `write_text` leaves its partial file, wherever it wrote."""
    names = ("manifest.json", "deep/er/[x] a.json", "finished/value.json")
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.getcwd()!r})
from pathlib import Path
from core import atomic
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
atomic.write_text(Path(sys.argv[1]), "half")
"""
    for name in names:
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)])
    others = ("eval.partial/siqa.json", ".hidden.partial", "3.4.partial", "manifest.json")
    for name in others:
        atomic.write_text(tmp_path / name, "kept")
    assert len(list(tmp_path.rglob(".*.partial"))) == len(names) + 1

    atomic.remove_leftovers(tmp_path, skip={tmp_path / "finished"})
    (left,) = tmp_path.glob("finished/.*.partial")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*others, str(left.relative_to(tmp_path))}
