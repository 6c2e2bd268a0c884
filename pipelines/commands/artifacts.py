"""`mobilemoe publish` and `mobilemoe fetch`: artifact folders to and from any fsspec address, resumable and verified.

An artifact is a folder with a SHA256SUMS over its files. Publishing sends that file last, fetching reads it first and
believes nothing else: every file must have the hash it states, on either side.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from core.errors import RefusedInput
from eval.export.artifact_folder import CHECKSUMS, parse_checksums, verify_checksums
from pipelines.commands import object_stores  # noqa: F401  (registers s3:// and gs://)

CHUNK_BYTES = 8 << 20

Report = Callable[[str, int, int], None]


def publish(source: Path, destination: str, report: Report = lambda phase, done, total: None) -> list[str]:
    """Send an artifact folder, or each artifact of a run's `artifacts/`, to `destination`.

    A file that is there with the right hash is not sent again; every file sent is read back.

    Args:
        source: a folder with SHA256SUMS, which becomes `destination`; or a run, whose artifacts become folders in it.
        destination: a path or an address such as s3://bucket/models, gs://, hf://, ssh://host/path.

    Returns:
        The addresses of the folders that are now complete.

    Raises:
        RefusedInput: no artifact there, a damaged one, or an address that cannot be written.
    """
    folders = {destination.rstrip("/"): Path(source)}
    if not (Path(source) / CHECKSUMS).is_file():
        found = sorted(path.parent for path in Path(source).glob(f"artifacts/*/{CHECKSUMS}"))
        if not found:
            raise RefusedInput(
                f"{source}: neither an artifact ({CHECKSUMS}) nor a run with artifacts/; export one first"
            )
        folders = {f"{destination.rstrip('/')}/{folder.name}": folder for folder in found}
    for address, folder in folders.items():
        verify_checksums(folder)
        _send(folder, address, report)
    return list(folders)


def _send(folder: Path, address: str, report: Report) -> None:
    system, root = open_address(address)
    if "http" in system.protocol:
        raise RefusedInput(f"{address}: http addresses can be fetched from but not published to")
    hashes = parse_checksums((folder / CHECKSUMS).read_text(), str(folder))
    for i, (name, expected) in enumerate(hashes.items()):
        report(f"{address}/{name}", i, len(hashes))
        remote = f"{root}/{name}"
        if system.exists(remote) and _remote_hash(system, remote) == expected:
            continue
        system.makedirs(remote.rpartition("/")[0], exist_ok=True)
        system.put_file(str(folder / name), remote)
        if (found := _remote_hash(system, remote)) != expected:
            raise RefusedInput(f"{address}/{name} reads back with SHA-256 {found}, sent was {expected}; publish again")
    system.put_file(str(folder / CHECKSUMS), f"{root}/{CHECKSUMS}")


def fetch(source: str, folder: Path, report: Report = lambda phase, done, total: None) -> Path:
    """Bring the artifact at `source` into `folder`.

    Files arrive in `folder`.partial; what a cut-off fetch left there is continued, in the middle of a file where the
    other side can send a part of one. `folder` appears when every file has its hash.

    Raises:
        RefusedInput: no SHA256SUMS at `source`, a path in it that leaves the folder, a file that is missing or has
            another hash, or a `folder` that holds something else.
    """
    system, root = open_address(source)
    try:
        sums = system.cat_file(f"{root}/{CHECKSUMS}").decode()
    except FileNotFoundError as error:
        raise RefusedInput(f"{source} has no {CHECKSUMS}: no artifact, or not completely published") from error
    hashes = parse_checksums(sums, source)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / CHECKSUMS).is_file() or (folder / CHECKSUMS).read_text() != sums:
            raise RefusedInput(f"{folder} exists and holds something else; name another folder")
        verify_checksums(folder)
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    for i, (name, expected) in enumerate(hashes.items()):
        report(name, i, len(hashes))
        _bring(system, f"{root}/{name}", partial / name, expected)
    (partial / CHECKSUMS).write_text(sums)
    _drop_strangers(partial, {*hashes, CHECKSUMS})
    if folder.exists():
        folder.rmdir()
    os.replace(partial, folder)
    return folder


def open_address(address: str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the address as a path in it.

    Raises:
        RefusedInput: an unknown protocol, or one whose package is not installed.
    """
    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise RefusedInput(f"{address}: {error}") from error
    return system, path.rstrip("/")


def _bring(system: AbstractFileSystem, remote: str, target: Path, expected: str) -> None:
    if target.is_file() and _hash(target.open("rb")) == expected:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if not _continue(system, remote, part):
        try:
            system.get_file(remote, str(part))
        except FileNotFoundError as error:
            raise RefusedInput(
                f"{remote} is listed in {CHECKSUMS} but missing there; have it published again"
            ) from error
    if (found := _hash(part.open("rb"))) != expected:
        part.unlink()
        raise RefusedInput(
            f"{remote} has SHA-256 {found}, {CHECKSUMS} says {expected}; fetch again or have it repaired"
        )
    os.replace(part, target)


def _continue(system: AbstractFileSystem, remote: str, part: Path) -> bool:
    """Append what `part` lacks; False where there is nothing to continue or the other side sends whole files only."""
    have = part.stat().st_size if part.is_file() else 0
    size = system.info(remote)["size"] if have else None
    if size is None or have > size:
        return False
    with part.open("ab") as file:
        while have < size:
            stop = min(have + CHUNK_BYTES, size)
            data = system.cat_file(remote, start=have, end=stop)
            if len(data) != stop - have:
                return False
            file.write(data)
            have = stop
    return True


def _drop_strangers(folder: Path, names: set[str]) -> None:
    """Remove what an earlier fetch of another artifact left in the partial folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _remote_hash(system: AbstractFileSystem, remote: str) -> str:
    return _hash(system.open(remote, "rb"))


def _hash(file) -> str:
    digest = hashlib.sha256()
    with file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file) -> Iterator[bytes]:
    while block := file.read(CHUNK_BYTES):
        yield block
