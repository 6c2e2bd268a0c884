"""Known vulnerabilities of the versions that requirements.lock pins, by the database of the package `safety-db`.

    python -m tests.supply.advisories --work DIR

pip downloads the database into DIR. It ends in July 2021, so that an empty answer says little: where the network
reaches an advisory service, pip-audit is the check (docs/supply.md). The exit status is 1 if there is one.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZipFile

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.supply.locked import LOCK, read_pins

DATABASE = "safety-db==2021.7.17"


def find_advisories(pins: Mapping[str, str], database: Mapping[str, list]) -> list[tuple[str, str, str]]:
    """Return (distribution, identifier, text) of every advisory that names a pinned version.

    Args:
        pins: normalised name -> version.
        database: distribution -> entries with `specs` (a version is named if any of them holds), `id` and `advisory`;
            the key `$meta` is none.
    """
    return [
        (name, entry["id"], entry["advisory"])
        for found, entries in database.items()
        if (name := canonicalize_name(found)) in pins
        for entry in entries
        if any(SpecifierSet(spec).contains(pins[name], prereleases=True) for spec in entry["specs"])
    ]


def main() -> int:
    """Print the advisories; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the database")
    work = parser.parse_args().work
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), DATABASE], check=True
    )
    (wheel,) = work.glob("safety_db-*.whl")
    with ZipFile(wheel) as archive:
        database = json.loads(archive.read("safety_db/insecure_full.json"))
    pins = read_pins(LOCK.read_text())
    known = sum(canonicalize_name(name) in pins for name in database)
    found = find_advisories(pins, database)
    print(f"{len(pins)} distributions, {known} of them in the database: {len(found)} advisories")
    for name, identifier, text in found:
        print(f"{name} {pins[name]}: {identifier}: {text}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
