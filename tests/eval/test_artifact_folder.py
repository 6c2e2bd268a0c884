"""Tests of eval.export.artifact_folder and core.checksums: whole or not there, and nowhere else."""

import os
from pathlib import Path

import pytest

from core.checksums import CHECKSUMS, verify_checksums, write_checksums
from core.errors import DamagedData, RefusedInput
from eval.export.artifact_folder import new_folder


def test_an_earlier_artifact_is_replaced_and_another_folder_is_not(tmp_path):
    for content in ("1", "2"):
        with new_folder(tmp_path / "a", None) as folder:
            (folder / "file").write_text(content)
    assert (tmp_path / "a/file").read_text() == "2" and verify_checksums(tmp_path / "a") == 2
    (tmp_path / "a" / CHECKSUMS).unlink()
    with pytest.raises(RefusedInput, match="is not an earlier export"), new_folder(tmp_path / "a", None):
        pass


def test_a_link_that_lay_in_the_way_is_removed_and_not_followed(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private/keys").write_text("mine")
    (tmp_path / "a.partial").symlink_to(tmp_path / "private")
    with new_folder(tmp_path / "a", None) as folder:
        (folder / "keys").write_text("ours")
    assert {path.name: path.read_text() for path in (tmp_path / "private").iterdir()} == {"keys": "mine"}
    assert not (tmp_path / "a").is_symlink() and verify_checksums(tmp_path / "a") == 2


def test_a_folder_that_was_exchanged_while_it_was_written_does_not_become_an_artifact(tmp_path):
    with new_folder(tmp_path / "a", None) as folder:
        (folder / "file").write_text("earlier")
    (tmp_path / "other").mkdir()
    with (
        pytest.raises(DamagedData, match="put in its place while it was written"),
        new_folder(tmp_path / "a", None) as folder,
    ):
        (folder / "file").write_text("x")
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "other")
    assert (tmp_path / "a/file").read_text() == "earlier", "the earlier artifact stays"


@pytest.mark.parametrize("name", ["a\nb", "CON", "a:b", "x."])
def test_names_that_nobody_could_fetch_are_refused_when_they_are_written(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(RefusedInput, match="rename it there"):
        write_checksums(tmp_path)


def test_every_file_is_flushed_before_the_artifact_appears(tmp_path, monkeypatch):
    flushed, fsync = set(), os.fsync

    def record(descriptor: int) -> None:
        flushed.add((os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino))
        fsync(descriptor)

    replace = os.replace

    def check(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "a":
            there = [Path(source), *Path(source).rglob("*")]
            assert {(path.stat().st_dev, path.stat().st_ino) for path in there} <= flushed and len(there) == 6
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)
    with new_folder(tmp_path / "a", None) as folder:
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("1")
        (folder / "file").write_text("2")
    assert verify_checksums(tmp_path / "a") == 3
