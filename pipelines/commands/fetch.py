"""`mobilemoe fetch`: an artifact folder from an address, verified and resumable.

SHA256SUMS is read first and nothing else is believed: every file must have the hash that it states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from core.atomic import atomic_write
from core.errors import DamagedData, RefusedInput
from core.hashing import sha256_file
from core.progress import Progress, ignore_progress, print_progress
from pipelines.commands.command import emit_result

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CHUNK_BYTES = 8 << 20
"""Size of the parts in which the rest of a half-fetched file is asked for."""


@dataclass(frozen=True)
class Fetch:
    """Download an artifact from an address into a folder; verified, and resumed when called again."""

    source: tyro.conf.Positional[str]
    """Path or address of an artifact folder: http(s)://, s3://, gs://, hf://."""
    folder: tyro.conf.Positional[Path]
    json: bool = False
    """One JSON object on stdout."""


def fetch(arguments: Fetch) -> None:
    """Fetch an artifact and print its folder.

    Raises:
        RefusedInput, DamagedData: as `fetch_artifact`.
    """
    fetch_artifact(arguments.source, arguments.folder, print_progress)
    emit_result(arguments.json, {"fetched": str(arguments.folder)}, lambda: f"fetched: {arguments.folder}")


def fetch_artifact(source: str, folder: Path, progress: Progress = ignore_progress) -> Path:
    """Download the artifact at `source` into `folder` and return the folder.

    Files arrive in `folder`.partial. What an interrupted fetch left there is continued, in the middle of a file where
    the other side can send a part of one. `folder` appears when every file has its hash.

    Raises:
        RefusedInput: no SHA256SUMS at `source`, a path in it that leaves the folder, or a `folder` that holds
            something else.
        DamagedData: a file at `source` is missing or has another hash; or one in the `folder` of an earlier fetch has.
    """
    from eval.export.artifact_folder import CHECKSUMS, parse_checksums, verify_checksums
    from pipelines.commands.transfer import open_address

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
    with atomic_write(folder, keep_partial=True) as partial:
        for i, (name, expected) in enumerate(hashes.items()):
            progress(name, i, len(hashes))
            download_file(system, f"{root}/{name}", partial / name, expected)
        (partial / CHECKSUMS).write_text(sums)
        remove_unlisted(partial, {*hashes, CHECKSUMS})
        if folder.exists():  # it is empty, and a folder cannot be renamed over another
            folder.rmdir()
    return folder


def download_file(system: "AbstractFileSystem", remote: str, target: Path, expected: str) -> None:
    """Download one file, unless it is there already.

    Args:
        expected: its SHA-256.

    Raises:
        DamagedData: the file is missing, or has another hash; what was downloaded of it is removed.
    """
    if target.is_file() and sha256_file(target) == expected:
        return
    with atomic_write(target, keep_partial=True) as partial:
        if not resume_download(system, remote, partial):
            try:
                system.get_file(remote, str(partial))
            except FileNotFoundError as error:
                raise DamagedData(
                    f"{remote} is listed in SHA256SUMS but missing there; have it published again"
                ) from error
        if (found := sha256_file(partial)) != expected:
            # The part that was there may be of another file, so the next call starts over.
            partial.unlink()
            raise DamagedData(
                f"{remote} has SHA-256 {found}, SHA256SUMS says {expected}; fetch again or have it repaired"
            )


def resume_download(system: "AbstractFileSystem", remote: str, partial: Path) -> bool:
    """Append to `partial` what it lacks of the remote file.

    Returns:
        False where there is nothing to continue, or where the other side sends whole files only.
    """
    have = partial.stat().st_size if partial.is_file() else 0
    size = system.info(remote)["size"] if have else None
    if size is None or have > size:
        return False
    with partial.open("ab") as file:
        while have < size:
            stop = min(have + CHUNK_BYTES, size)
            data = system.cat_file(remote, start=have, end=stop)
            if len(data) != stop - have:
                return False
            file.write(data)
            have = stop
    return True


def remove_unlisted(folder: Path, names: set[str]) -> None:
    """Remove the files whose paths are not in `names`: an earlier fetch of another artifact left them."""
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folders that hold them
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()
