"""Try the newest version of every declared dependency, one at a time: which contract test breaks by which upgrade.

    python -m tests.supply.newest --work DIR [--only NAME ...]

An upgrade is installed into a folder of its own, with what else pip would change for it, and put in front of the
environment's packages. The environment itself stays as it is. The table goes to stdout; the exit status is 1 if a
contract test breaks. Run it once a week (docs/supply.md).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from tests.supply.locked import ROOT

CONTRACTS = tuple(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/test_*contracts.py")))
"""Files of tests, below the repository, that state what the project expects of others' undocumented behaviour."""
CONTRACT_SECONDS = 1800
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]


def read_dependencies(project: str) -> list[str]:
    """Return the requirements of a pyproject.toml's text without their versions: `datatrove[io,processing]`."""
    requirements = map(Requirement, tomllib.loads(project)["project"]["dependencies"])
    return [requirement.name + _format_extras(requirement) for requirement in requirements]


def _format_extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def find_upgrade(requirement: str) -> dict[str, str]:
    """Return what pip would install for the newest version of a requirement, name -> version; empty if it is there.

    Raises:
        RuntimeError: pip finds no set of versions that fit.
    """
    command = [*_PIP, "--upgrade", "--dry-run", "--report", "-", requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(done.stdout)["install"]}


def install_beside(upgrade: dict[str, str], folder: Path) -> None:
    """Install exact versions, without their dependencies, into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    pins = [f"{name}=={version}" for name, version in upgrade.items()]
    subprocess.run([*_PIP, "--no-deps", "--target", str(folder), *pins], check=True)


def run_contracts(folder: Path | None, tests: Sequence[str], root: Path = ROOT) -> list[str]:
    """Run tests with the packages of a folder in front of the environment's; return which fail, without parameters.

    A run that ends in another way than with failing tests counts as one failure, by its last line.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [folder and str(folder), str(root)]))}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-o", "addopts=", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=CONTRACT_SECONDS, check=False
    )
    ids = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    failed = sorted({test.partition("[")[0] for test in ids})
    if done.returncode and not failed:
        return [(done.stdout + done.stderr).strip().splitlines()[-1]]
    return failed


def format_row(requirement: str, upgrade: dict[str, str], broken: list[str]) -> str:
    """Return a row of the table: the upgrade, what else moves, and the contract tests that break."""
    name = Requirement(requirement).name
    others = [f"{other} {version}" for other, version in upgrade.items() if other.lower() != name.lower()]
    newest = next((version for other, version in upgrade.items() if other.lower() == name.lower()), "")
    cells = [name, newest, ", ".join(others) or "-", ", ".join(broken) or "none"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Print the table; return 1 if an upgrade breaks a contract test, or pip finds no fitting versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the upgrades, one at a time")
    parser.add_argument("--only", nargs="+", help="names of dependencies")
    arguments = parser.parse_args()
    requirements = read_dependencies((ROOT / "pyproject.toml").read_text())
    if unknown := set(arguments.only or ()) - {Requirement(text).name for text in requirements}:
        parser.error(f"--only {' '.join(sorted(unknown))}: not declared in pyproject.toml")
    if broken := run_contracts(None, CONTRACTS):
        parser.error(f"contract tests fail without any upgrade: {', '.join(broken)}")
    print("| dependency | newest | moves with it | contract tests that break |\n|---|---|---|---|", flush=True)
    worst = 0
    for requirement in requirements:
        if arguments.only and Requirement(requirement).name not in arguments.only:
            continue
        try:
            if not (upgrade := find_upgrade(requirement)):
                continue
        except RuntimeError as error:
            print(format_row(requirement, {}, [str(error)]), flush=True)
            worst = 1
            continue
        install_beside(upgrade, arguments.work)
        broken = run_contracts(arguments.work, CONTRACTS)
        print(format_row(requirement, upgrade, broken), flush=True)
        worst = max(worst, int(bool(broken)))
    shutil.rmtree(arguments.work, ignore_errors=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
