"""The manifest: a reader never sees half of it; packages: what the registry doesn't give is a missing key."""

import json
import os
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from core.atomic import write_json
from core.progress import ignore_progress
from data.catalogue.corpora import Requirement
from pipelines.engine.manifest import Manifest
from pipelines.engine.progress_file import ProgressFile
from pipelines.status import read_status
from pipelines.steps.fetch import fetch_packages
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
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    others = [f".absent-1.0-sdist.other-{host}.{ended.pid}", f".absent-1.0-sdist.{host}.{os.getppid()}"]
    for name in (*others, f".absent-1.0-sdist.{host}.{ended.pid}"):  # the last one's process was killed
        (tmp_path / "packages" / name).mkdir()
    said = []
    wanted = {"here": Requirement("here==1.0", sdist=False), "absent": Requirement("absent==1.0", sdist=True)}
    assert download_packages(wanted, said.append) == {"here": cached}
    assert len(said) == 1 and "absent==1.0 could not be fetched: ERROR: No matching distribution" in said[0]
    assert {path.name for path in (tmp_path / "packages").iterdir()} == {"here-1.0", *others}


def test_progress_file_holds_the_last_word_of_a_phase(tmp_path):
    report = ProgressFile(tmp_path / "data" / "data.json")
    for done in range(6):
        report("read", done, 5)
    assert json.loads(report.path.read_text())["done"] == 5
    report("write", 0, 5)
    report("write", 1, 5)
    assert json.loads(report.path.read_text())["done"] == 0  # too soon after the last


def test_packages_of_a_step_that_was_killed_before_it_was_recorded_are_taken(tmp_path, monkeypatch):
    """A folder that is there could not be renamed into place a second time, whatever was done."""
    file = tmp_path / "here-1.0.whl"
    file.write_bytes(b"wheel")
    context = SimpleNamespace(run=tmp_path / "run", progress=lambda step: ignore_progress, log_line=lambda line: None)
    wanted = {name: Requirement(f"{name}==1.0", sdist=False) for name in ("here", "gone")}
    monkeypatch.setattr("pipelines.steps.fetch.download_packages", lambda *_: {"here": file})
    made = fetch_packages(context, wanted)
    assert made["missing"] == ["gone"] and made["packages"]["here"]["file"] == file.name
    monkeypatch.setattr("pipelines.steps.fetch.download_packages", lambda *_: {})
    assert fetch_packages(context, wanted) == made


def test_a_clock_that_is_set_back_takes_no_second_from_a_step(tmp_path, monkeypatch):
    manifest, now = Manifest(tmp_path), time.time()
    manifest.start("items", {"version": 1, "fingerprint": "f", "config": {}, "inputs": {}})
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    manifest.finish("items", "done")
    assert 0 <= manifest.step("items")["seconds"] < 600


@pytest.mark.parametrize("when", ["start", "finish"])
def test_a_disk_that_runs_full_leaves_a_manifest_that_says_how_far_the_run_came(when, tmp_path, smoke, monkeypatch):
    """The file before, no partial one, and the same command resumes the step."""
    manifest = Manifest(tmp_path)
    manifest.describe(smoke)
    record = {"version": 1, "fingerprint": "f", "config": {}, "inputs": {}}
    if when == "finish":
        manifest.start("items", record)
    before = (tmp_path / "manifest.json").read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            manifest.start("items", record) if when == "start" else manifest.finish("items", "done")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert (tmp_path / "manifest.json").read_bytes() == before
    states = {step.name: step.state for step in read_status(tmp_path).steps}
    assert states["items"] == ("pending" if when == "start" else "interrupted")
