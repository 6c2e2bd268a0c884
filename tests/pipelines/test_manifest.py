"""The manifest: a reader never sees half of it; packages: what the registry doesn't give is a missing key."""

import json
import threading

import pytest

from core.atomic import write_json
from data.catalogue.corpora import Requirement
from pipelines.engine.manifest import Manifest
from pipelines.engine.progress_file import ProgressFile
from pipelines.steps.package_cache import download_packages


def test_reader_never_sees_half_a_file(tmp_path):
    path, stop, seen = tmp_path / "manifest.json", threading.Event(), set()
    write_json(path, {"value": 0, "filler": "x" * 200_000})

    def read():
        while not stop.is_set():
            content = json.loads(path.read_text())
            assert len(content["filler"]) == 200_000
            seen.add(content["value"])

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(1, 60):
        write_json(path, {"value": value, "filler": "x" * 200_000})
    stop.set()
    reader.join()
    assert seen and [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}


def test_manifest_describes_the_run(tmp_path, smoke):
    manifest = Manifest(tmp_path)
    manifest.describe(smoke)
    created = manifest.content["created"]
    again = Manifest(tmp_path)
    again.describe(smoke)
    assert again.content["created"] == created
    assert again.content["versions"]["torchtitan"] == "0.3.0"
    assert again.content["recipe"]["model"]["n_experts"] == 16


def test_package_the_registry_lacks_is_a_missing_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBILEMOE_CACHE", str(tmp_path))
    cached = tmp_path / "packages" / "here-1.0" / "here-1.0-py3-none-any.whl"
    cached.parent.mkdir(parents=True)
    cached.touch()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said = []
    wanted = {"here": Requirement("here==1.0", sdist=False), "absent": Requirement("absent==1.0", sdist=True)}
    assert download_packages(wanted, said.append) == {"here": cached}
    assert len(said) == 1 and "absent==1.0 could not be fetched: ERROR: No matching distribution" in said[0]
    assert sorted(path.name for path in (tmp_path / "packages").iterdir()) == ["here-1.0"]


def test_progress_file_holds_the_last_word_of_a_phase(tmp_path):
    report = ProgressFile(tmp_path / "data" / "data.json")
    for done in range(6):
        report("read", done, 5)
    assert json.loads(report.path.read_text())["done"] == 5
    report("write", 0, 5)
    report("write", 1, 5)
    assert json.loads(report.path.read_text())["done"] == 0  # too soon after the last
