"""Tests of the weekly check for newer versions, and of the one for advisories."""

import subprocess
import sys

import pytest

from tests.supply import newest
from tests.supply.advisories import find_advisories

CONTRACT = """
import pytest
import tiny_thing

@pytest.mark.parametrize("prefix", ["", "of a thing - "])
def test_a_name(prefix):
    assert prefix + tiny_thing.NAME == prefix + "old"

def test_a_number():
    assert tiny_thing.NUMBER == 1
"""


def test_requirements_are_read_without_their_versions():
    project = '[project]\ndependencies = ["b[y,x]==1.0", "a<4", "c"]'
    assert newest.read_dependencies(project) == ["b[x,y]", "a", "c"]
    assert len(newest.read_dependencies((newest.ROOT / "pyproject.toml").read_text())) > 30
    assert len(newest.CONTRACTS) >= 7 and all((newest.ROOT / path).is_file() for path in newest.CONTRACTS)


@pytest.mark.parametrize(
    ("name", "broken"), [("old", []), ("new", ["tests/test_thing.py::test_a_name"]), (None, ["tests/test_thing.py"])]
)
def test_a_contract_that_an_upgrade_breaks_is_named(tmp_path, name, broken):
    (tmp_path / "root/tests").mkdir(parents=True)
    (tmp_path / "root/tests/test_thing.py").write_text(CONTRACT)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/tiny_thing.py").write_text(f"NAME, NUMBER = {name!r}, 1" if name else "raise RuntimeError")
    found = newest.run_contracts(tmp_path / "beside", ["tests/test_thing.py"], tmp_path / "root")
    assert found == broken


def test_a_run_of_no_tests_is_a_failure(tmp_path):
    (line,) = newest.run_contracts(None, ["missing.py"], tmp_path)
    assert "missing.py" in line


def test_an_upgrade_that_pip_cannot_find_says_so(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="No matching distribution found for mobilemoe-has-no-such"):
        newest.find_upgrade("mobilemoe-has-no-such-dependency")


def test_rows_say_what_moves_and_what_breaks():
    row = newest.format_row("b[x]", {"B": "2.0", "a": "1.1"}, [])
    assert row == "| b | 2.0 | a 1.1 | none |"
    assert newest.format_row("b", {"b": "2.0"}, ["t::x", "t::y"]) == "| b | 2.0 | - | t::x, t::y |"


def test_a_name_that_is_not_declared_is_refused(tmp_path):
    command = [sys.executable, "-m", "tests.supply.newest", "--work", str(tmp_path), "--only", "nothing"]
    done = subprocess.run(command, cwd=newest.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--only nothing: not declared" in done.stderr


def test_advisories_of_pinned_versions_are_found():
    entries = [
        {"id": "1", "advisory": "old", "specs": ["<1.0"]},
        {"id": "2", "advisory": "either", "specs": ["<1.0", ">=2.0,<3.0"]},
        {"id": "3", "advisory": "all", "specs": [">0"]},
    ]
    database = {"$meta": [], "Some_Thing": entries, "other": entries}
    found = find_advisories({"some-thing": "2.5"}, database)
    assert found == [("some-thing", "2", "either"), ("some-thing", "3", "all")]
    assert find_advisories({"some-thing": "0.9"}, database)[0][1] == "1"
