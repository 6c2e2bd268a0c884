"""requirements.lock: the version of every distribution, and the hashes of its files.

    python -m tests.supply.locked

writes the hashes anew from the package index, after a version was changed.
"""

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import (
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
INDEX = "https://pypi.org/simple"
PYTHONS = [(3, 11), (3, 12)]
ARCHITECTURES = ["x86_64", "aarch64"]
GLIBC_MINORS = range(41, 4, -1)
"""Minor versions of glibc that a wheel may ask for."""
_PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[^\s\\]+)(?P<hashes>(?:[ \\\n]+--hash=sha256:[0-9a-f]{64})*)", re.M)


def read_pins(text: str) -> dict[str, str]:
    """Return the distributions of a lock's text, normalised name (PEP 503) -> version."""
    return {canonicalize_name(pin["name"]): pin["version"] for pin in _PIN.finditer(text)}


def read_hashes(text: str) -> dict[str, list[str]]:
    """Return the SHA-256 hashes of a lock's text, normalised name -> hexadecimal digits."""
    return {
        canonicalize_name(pin["name"]): re.findall(r"sha256:([0-9a-f]{64})", pin["hashes"])
        for pin in _PIN.finditer(text)
    }


def list_tags() -> set[Tag]:
    """Return the tags of the wheels that fit Linux with glibc on one of the architectures and Pythons."""
    tags: set[Tag] = set()
    for architecture in ARCHITECTURES:
        platforms = [f"manylinux_2_{minor}_{architecture}" for minor in GLIBC_MINORS]
        platforms += [f"manylinux{year}_{architecture}" for year in ("2014", "2010", "1")] + [f"linux_{architecture}"]
        for python in PYTHONS:
            tags.update(cpython_tags(python, platforms=platforms))
            tags.update(compatible_tags(python, platforms=platforms))
    return tags


def choose_files(files: list[dict], version: str, tags: set[Tag]) -> list[str]:
    """Return the sorted hashes of a version's source archive and of its wheels that fit.

    Args:
        files: `files` of the index's answer (PEP 691).
    """
    hashes = []
    for file in files:
        name = file["filename"]
        try:
            if name.endswith(".whl"):
                _, found, _, wheel_tags = parse_wheel_filename(name)
                fits = not tags.isdisjoint(wheel_tags)
            elif name.endswith((".tar.gz", ".zip")):
                _, found = parse_sdist_filename(name)
                fits = True
            else:
                continue
        except (InvalidWheelFilename, ValueError):  # names from before PEP 440, of versions that nobody pins
            continue
        if fits and found == Version(version):
            hashes.append(file["hashes"]["sha256"])
    return sorted(hashes)


def ask_index(name: str) -> list[dict]:
    """Return all files of a distribution.

    Raises:
        OSError: the index does not answer.
    """
    request = urllib.request.Request(
        f"{INDEX}/{canonicalize_name(name)}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["files"]


def write_lock(pins: dict[str, str], hashes: dict[str, list[str]]) -> str:
    """Return the text of a lock, as pip reads and pip-tools writes it.

    Raises:
        ValueError: a version has no file.
    """
    if missing := [f"{name}=={version}" for name, version in pins.items() if not hashes[canonicalize_name(name)]]:
        raise ValueError(f"the index has no file for {missing}: pin versions that it has")
    lines = [
        [f"{name}=={version}", *(f"--hash=sha256:{digits}" for digits in hashes[canonicalize_name(name)])]
        for name, version in pins.items()
    ]
    return "".join(" \\\n    ".join(parts) + "\n" for parts in lines)


def main() -> None:
    """Write the hashes of requirements.lock anew."""
    pins = {pin["name"]: pin["version"] for pin in _PIN.finditer(LOCK.read_text())}
    tags = list_tags()
    with ThreadPoolExecutor(8) as pool:
        files = dict(zip(pins, pool.map(ask_index, pins), strict=True))
    hashes = {canonicalize_name(name): choose_files(files[name], version, tags) for name, version in pins.items()}
    LOCK.write_text(write_lock(pins, hashes))


if __name__ == "__main__":
    main()
