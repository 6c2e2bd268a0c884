"""Tests of requirements.lock: whole, with hashes, nothing in it that nobody asks for, and what pip makes of it."""

import hashlib
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply.locked import LOCK, ROOT, read_hashes, read_pins

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def test_every_pin_has_hashes():
    text = LOCK.read_text()
    pins, hashes = read_pins(text), read_hashes(text)
    assert len(pins) > 290 and text.count("==") == len(pins)
    assert [name for name in pins if not hashes[name]] == []
    assert sum(len(digits) for digits in hashes.values()) == text.count("--hash=")


def collect_needed(requirements: list[str]) -> set[str]:
    """Return the normalised names of all distributions that requirements need, those of their extras included.

    `pip check` does not look at extras.
    """
    needed: set[tuple[str, str]] = set()
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for asked in ("", *requirement.extras):
            if (key := (canonicalize_name(requirement.name), asked)) not in needed:
                needed.add(key)
                waiting += [(text, asked) for text in distribution(requirement.name).requires or ()]
    return {name for name, _ in needed}


def test_the_lock_has_what_is_needed_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = collect_needed(project["dependencies"] + project["optional-dependencies"]["dev"])
    assert needed == read_pins(LOCK.read_text()).keys()


def test_the_environment_is_what_the_lock_says_and_fits_together():
    done = subprocess.run([*PIP, "check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "No broken requirements found.")
    installed = {name: distribution(name).version for name in read_pins(LOCK.read_text())}
    assert installed == read_pins(LOCK.read_text())


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
    (tmp_path / "lock").write_text(f"tiny-thing==1.0 \\\n    --hash=sha256:{digits}\n")
    assert read_hashes((tmp_path / "lock").read_text()) == {"tiny-thing": [digits]}
    if changed:
        with ZipFile(wheel, "a") as archive:
            archive.writestr("more.py", "")
    command = [*PIP, "install", "--quiet", "--no-index", "--find-links", ".", "--target", "out", "-r", "lock"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (tmp_path / "out/tiny_thing.py").exists() is not changed
    assert ("DO NOT MATCH THE HASHES" in done.stderr) is changed
