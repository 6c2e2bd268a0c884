"""Tests of requirements.lock: whole, with hashes of the right files, and what pip makes of them."""

import hashlib
import json
import subprocess
import sys
from zipfile import ZipFile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.supply.locked import LOCK, choose_files, list_tags, read_hashes, read_pins, write_lock

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def test_every_pin_has_hashes():
    text = LOCK.read_text()
    pins, hashes = read_pins(text), read_hashes(text)
    assert len(pins) > 290 and text.count("==") == len(pins)
    assert [name for name in pins if not hashes[name]] == []
    assert sum(len(digits) for digits in hashes.values()) == text.count("--hash=")


def test_the_environment_is_what_the_lock_says_and_fits_together():
    done = subprocess.run([*PIP, "check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "No broken requirements found.")
    # With hashes pip refuses anything that a distribution needs and the lock does not name.
    command = [*PIP, "install", "--quiet", "--no-input", "--dry-run", "--no-index", "--report", "-", "-r", str(LOCK)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["install"] == []


def file(name: str) -> dict:
    return {"filename": name, "hashes": {"sha256": hashlib.sha256(name.encode()).hexdigest()}}


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a_b-1.0-py3-none-any.whl", True),
        ("a_b-1.0.tar.gz", True),
        ("a_b-1.0-cp311-cp311-manylinux_2_28_x86_64.whl", True),
        ("a_b-1.0-cp312-cp312-manylinux2014_aarch64.manylinux_2_17_aarch64.whl", True),
        ("a_b-1.0-cp39-abi3-manylinux_2_28_x86_64.whl", True),
        ("a_b-1.0-cp310-cp310-manylinux_2_28_x86_64.whl", False),
        ("a_b-1.0-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("a_b-1.0-cp311-cp311-win_amd64.whl", False),
        ("a_b-1.0-cp311-cp311-macosx_11_0_arm64.whl", False),
        ("a_b-1.0.post1-py3-none-any.whl", False),
        ("a_b-1.0.exe", False),
        ("a_b-1.0rc-final-x-py3-none-any.whl", False),
    ],
)
def test_files_of_the_version_that_fit_are_chosen(name, fits):
    assert choose_files([file(name)], "1.0", list_tags()) == ([file(name)["hashes"]["sha256"]] if fits else [])


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,9}", fullmatch=True), st.sampled_from(["1", "2.0.post1"])))
def test_a_lock_reads_back(pins):
    hashes = {name: sorted({hashlib.sha256(f"{name}{i}".encode()).hexdigest() for i in range(2)}) for name in pins}
    text = write_lock(pins, hashes)
    assert read_pins(text) == pins and read_hashes(text) == hashes


def test_a_version_without_files_is_refused():
    with pytest.raises(ValueError, match=r"no file for \['a==1'\]"):
        write_lock({"a": "1", "b": "2"}, {"a": [], "b": ["0" * 64]})


@pytest.mark.parametrize("changed", [False, True])
def test_pip_takes_the_file_of_the_hash_alone(tmp_path, changed):
    wheel = tmp_path / "tiny_thing-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing.py", "")
        for name, content in {
            "METADATA": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            archive.writestr(f"tiny_thing-1.0.dist-info/{name}", content)
    digits = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (tmp_path / "lock").write_text(write_lock({"tiny-thing": "1.0"}, {"tiny-thing": [digits]}))
    if changed:
        with ZipFile(wheel, "a") as archive:
            archive.writestr("more.py", "")
    command = [*PIP, "install", "--quiet", "--no-index", "--find-links", ".", "--target", "out", "-r", "lock"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "out/tiny_thing.py").exists() is not changed
    assert ("DO NOT MATCH THE HASHES" in done.stderr) is changed
