"""Tests of which room may import which: the data flows one way, and imports follow it (docs/architecture.md)."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("core", "data", "titan_ext", "eval", "pipelines")
TITAN_EXT_OF_EVAL = ("config", "loader", "mobilemoe", "model_stats", "quantization")
"""Modules and folders of titan_ext that eval may import: the model's dimensions, its formulas and its shard reader."""
ALLOWED = {
    "core": ("core",),
    "data": ("core", "data"),
    "titan_ext": ("core", "titan_ext"),
    "eval": ("core", "eval", *(f"titan_ext.{name}" for name in TITAN_EXT_OF_EVAL)),
    "eval/hf_mobilemoe": ("eval.hf_mobilemoe",),  # its files are copied into exported folders
    "pipelines": ROOMS,
    "tests": (*ROOMS, "tests", "benchmarks"),
    "benchmarks": (*ROOMS, "tests", "benchmarks"),
}
"""Folder -> modules that its files may import; a module allows those below it."""


def find_imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full module name of every import in a file, those inside of functions included."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from titan_ext import config` imports a module of the folder, `from titan_ext.config import X` a name.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def find_violations(folder: str) -> list[str]:
    """Return `file:line: module` for every import below a folder that its rule does not allow."""
    violations = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for line, module in find_imports(file):
            top = module.split(".")[0]
            if top in (*ROOMS, "tests", "benchmarks"):
                allowed = any(f"{module}.".startswith(f"{name}.") for name in ALLOWED[folder])
            else:
                allowed = folder != "core" or top in sys.stdlib_module_names
            if not allowed:
                violations.append(f"{file.relative_to(ROOT)}:{line}: {module}")
    return violations


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_its_rule_allows(folder):
    assert (ROOT / folder).is_dir()
    assert find_violations(folder) == []


def test_slurm_holds_no_python_modules():
    assert list((ROOT / "slurm").rglob("*.py")) == []


@pytest.mark.parametrize("folder", ["tests", *ROOMS])
def test_every_folder_with_modules_is_a_package(folder):
    folders = {file.parent for file in (ROOT / folder).rglob("*.py")}
    assert [path for path in sorted(folders) if not (path / "__init__.py").is_file()] == []
