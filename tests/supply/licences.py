"""The table of licences in docs/licences.md: of every distribution that requirements.lock names.

python -m tests.supply.licences > docs/licences.md
"""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError

from eval.export.licences import read_licence
from tests.supply.locked import LOCK, read_pins

STATED = {
    "antlr4-python3-runtime": "BSD-3-Clause",  # its metadata says "BSD"; its repository has three clauses
    "cuda-toolkit": "LicenseRef-Proprietary",  # a name for the packages nvidia-*, without a file of its own
    "paramiko": "LGPL-2.1-or-later",  # its metadata says "LGPL"; LICENSE is that of version 2.1
}
"""Licences that a distribution's metadata does not tell."""
_HEAD = """# Licences of what the program installs

`python -m tests.supply.licences > docs/licences.md` writes this page from the installed distributions of
requirements.lock; a test compares the two. An artifact names those that its weights were made with in `sbom.cdx.json`.

Nothing here is copied into the repository or into an artifact. Licences that ask something of whoever passes a package
on, for an image of a container say:

- LicenseRef-Proprietary: NVIDIA's libraries, which come with torch. NVIDIA's agreements allow passing on some of their
  files; read them first.
- LGPL: chardet, crc32c and paramiko are installed and imported unchanged.
- MPL, alone or as a choice: changes to the package's own files would have to be published.

| licence | distributions |
|---|---|
"""


def list_licences() -> dict[str, str]:
    """Return distribution -> SPDX expression, or "" where none can be told. Those not installed are left out."""
    found = {}
    for name in read_pins(LOCK.read_text()):
        try:
            found[name] = STATED.get(name) or read_licence(name)
        except PackageNotFoundError:  # of another architecture
            continue
    return found


def format_page(licences: dict[str, str]) -> str:
    """Return the page; the most frequent licences come first."""
    names = defaultdict(list)
    for name, licence in licences.items():
        names[licence].append(name)
    rows = sorted(names.items(), key=lambda row: (-len(row[1]), row[0]))
    return _HEAD + "".join(f"| {licence or 'not stated'} | {', '.join(sorted(names))} |\n" for licence, names in rows)


if __name__ == "__main__":
    print(format_page(list_licences()), end="")
