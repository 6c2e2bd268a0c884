"""SHA256SUMS: the hashes of all files of a folder, which can be checked by `sha256sum -c`. It is written last."""

import re
from pathlib import Path

from core.atomic import write_text
from core.errors import DamagedData, RefusedInput
from core.hashing import sha256_file
from core.inside import check_name, check_names

CHECKSUMS = "SHA256SUMS"
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_checksums(folder: Path) -> Path:
    """Write SHA256SUMS over every file of the folder and return its path.

    Raises:
        RefusedInput: a file's name cannot be used on every system, so that not everybody could fetch it.
    """
    sums = Path(folder) / CHECKSUMS
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p != sums)
    names = [path.relative_to(folder).as_posix() for path in files]
    check_names(names, str(folder))
    write_text(sums, "".join(f"{sha256_file(Path(folder, name))}  {name}\n" for name in names))
    return sums


def verify_checksums(folder: Path) -> int:
    """Check every file that SHA256SUMS lists and return their number; other files are not looked at.

    Raises:
        RefusedInput: SHA256SUMS is absent or malformed.
        DamagedData: a file is missing or differs; the message names it.
    """
    sums = Path(folder) / CHECKSUMS
    if not sums.is_file():
        raise RefusedInput(f"{folder} has no {CHECKSUMS}; the copy is incomplete or not one of our artifacts")
    hashes = parse_checksums(sums.read_text(encoding="utf-8"), str(folder))
    for name, expected in hashes.items():
        path = Path(folder) / name
        if not path.is_file():
            raise DamagedData(f"{path} is listed in {CHECKSUMS} but missing; copy the folder again")
        if (found := sha256_file(path)) != expected:
            raise DamagedData(f"{path} has SHA-256 {found}, {CHECKSUMS} says {expected}; copy the file again")
    return len(hashes)


def parse_checksums(text: str, where: str) -> dict[str, str]:
    """Return relative path -> SHA-256 (hexadecimal) of a SHA256SUMS file's text.

    Args:
        where: folder or address of the file, for error messages.

    Raises:
        RefusedInput: there is no line, a line has another form, or a path is no plain name below the folder
            (`core.inside.check_name`) or occurs twice.
    """
    hashes: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise RefusedInput(f"{where}/{CHECKSUMS}, line {number}: not of the form `<64 hex digits>  <path>`")
        sha256, name = match.groups()
        # A checksum file may come from an untrusted server: no path in it may point outside of the folder.
        check_name(name, f"{where}/{CHECKSUMS}, line {number}")
        if name in hashes or name == CHECKSUMS:
            raise RefusedInput(f"{where}/{CHECKSUMS}, line {number}: {name!r} must not be listed (again)")
        hashes[name] = sha256
    if not hashes:
        raise RefusedInput(f"{where}/{CHECKSUMS} is empty")
    return hashes
