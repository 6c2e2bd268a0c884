"""Tests that the paths, links and module names in README, CONTRIBUTING and docs/ exist."""

import re

import pytest

from tests.test_import_rules import ROOMS, ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP_FOLDERS = "|".join((*ROOMS, "slurm", "tests", "benchmarks", "docs"))
FILE = re.compile(rf"(?<![\w/.])((?:{TOP_FOLDERS})/[\w./-]*\.(?:py|md|sh|sbatch|yaml|cpp|h))\b")
FOLDER = re.compile(rf"`((?:{TOP_FOLDERS})/[\w./-]*)/`")
LINK = re.compile(r"\]\(([\w./-]+)\)")
MODULE = re.compile(r"`((?:core|titan_ext|eval|pipelines)(?:\.\w+)+)")
"""Names below `data` are left out: `data.languages` is a leaf of the recipe."""


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def resolves(name: str) -> bool:
    """Return whether a dotted name is a module of ours, or a name that is written in one."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:depth])
        file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
        if file or path.is_dir():
            rest = parts[depth:]
            return not rest or (file is not None and re.search(rf"\b{rest[0]}\b", file.read_text()) is not None)
    return False


def test_paths_and_links_exist(page):
    text = page.read_text()
    missing = [path for path in FILE.findall(text) + FOLDER.findall(text) if not (ROOT / path).exists()]
    missing += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert missing == []


def test_module_names_exist(page):
    assert [name for name in MODULE.findall(page.read_text()) if not resolves(name)] == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == [
        "README.md"
    ]
