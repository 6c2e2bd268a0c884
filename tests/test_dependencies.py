"""Tests that pyproject.toml declares every imported package, and that requirements.lock pins what it declares."""

import functools
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.supply.locked import LOCK, read_pins
from tests.test_import_rules import ROOMS, ROOT, find_imports


def find_third_party(folder: str) -> dict[str, str]:
    """Return every third-party module imported below a folder, mapped to a file that imports it."""
    modules = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        if file.name.startswith("compute_in_"):
            continue  # it runs in another environment, which the file beside it pins
        for _, module in find_imports(file):
            top = module.split(".")[0]
            # Files that are run as scripts import the files beside them by their bare names.
            local = (ROOT / top).is_dir() or (file.parent / f"{top}.py").is_file()
            if top not in sys.stdlib_module_names and not local:
                modules.setdefault(module, str(file.relative_to(ROOT)))
    return modules


@functools.cache
def read_distributions() -> dict[str, list[str]]:
    """Return top-level module -> installed distributions; a second to read, so it is read once."""
    return dict(packages_distributions())


def find_distributions(module: str) -> set[str]:
    """Return the normalised names of the installed distributions that a module can be from.

    Several distributions share a namespace package such as `google`; of these only the ones that hold the deepest
    folder of the module's name are returned.
    """
    parts = module.split(".")
    found = set(read_distributions().get(parts[0], ()))
    for depth in range(2, len(parts) + 1):
        if len(found) == 1:
            break
        prefix = "/".join(parts[:depth])
        holders = {
            name
            for name in found
            if any(str(path).startswith((f"{prefix}/", f"{prefix}.py")) for path in distribution(name).files or ())
        }
        found = holders or found
    return {canonicalize_name(name) for name in found}


def read_declared(*, dev: bool) -> dict[str, str]:
    """Return the declared distributions, normalised name -> requirement, with those of the extra `dev` if asked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + (project["optional-dependencies"]["dev"] if dev else [])
    return {canonicalize_name(Requirement(text).name): text for text in requirements}


@pytest.mark.parametrize("folder", [*ROOMS, "tests", "benchmarks"])
def test_every_imported_package_is_declared(folder):
    declared = read_declared(dev=folder not in ROOMS)
    undeclared = {
        module: file
        for module, file in find_third_party(folder).items()
        if not find_distributions(module) & declared.keys()
    }
    assert undeclared == {}


def test_the_lock_pins_every_declared_package_within_its_bounds():
    pins = read_pins(LOCK.read_text())
    for name, requirement in read_declared(dev=True).items():
        assert name in pins, f"{requirement}: not in requirements.lock"
        assert Requirement(requirement).specifier.contains(pins[name]), f"requirements.lock has {pins[name]}"
