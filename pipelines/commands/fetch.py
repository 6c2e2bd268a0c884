"""`mobilemoe fetch`: an artifact folder from an address, verified and resumable.

SHA256SUMS is read first and nothing else is believed: every file must have the hash that it states.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from core.atomic import atomic_write, partial_path
from core.checksums import CHECKSUMS, parse_checksums, verify_checksums
from core.errors import RefusedInput
from core.inside import Folder, check_names
from core.progress import Progress, ignore_progress, print_progress
from eval.export.formats import FORMATS
from pipelines.commands import inputs
from pipelines.commands.command import emit_result

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MAX_CHECKSUMS_BYTES = 16 << 20
"""Largest SHA256SUMS: that of some 150,000 files."""


@dataclass(frozen=True)
class Fetch:
    """Download an artifact from an address into a folder; verified, and resumed when called again."""

    source: tyro.conf.Positional[str]
    """Path or address of an artifact folder: http(s)://, s3://, gs://, hf://. With --format, of a run, or the one that
    `publish` sent a run's artifacts to, in either layout."""
    folder: tyro.conf.Positional[Path]
    """Folder to write; new, empty, or the same artifact. It is no link, and lies outside of the source."""
    format: Literal[tuple(FORMATS)] | None = None  # type: ignore[valid-type]  # the choices follow from the table
    """The artifact of this format alone."""
    json: bool = False
    """One JSON object on stdout."""


def fetch(arguments: Fetch) -> None:
    """Fetch an artifact and print its folder.

    Raises:
        RefusedInput, DamagedData: as `fetch_artifact`.
        TransferFailed: receiving was cut off.
    """
    from pipelines.commands.transfer import name_failures

    with name_failures(arguments.source):
        source = find_artifact(arguments.source, arguments.format) if arguments.format else arguments.source
        fetch_artifact(source, arguments.folder, print_progress)
    emit_result(arguments.json, {"fetched": str(arguments.folder)}, lambda: f"fetched: {arguments.folder}")


def find_artifact(source: str, format_name: str) -> str:
    """Return the address of one format's artifact: in a run, or beside the others of a run that was published.

    Raises:
        RefusedInput: there is none; names the formats that are there.
    """
    from pipelines.commands.transfer import locate, open_address

    base = source.rstrip("/")
    middles = ["/artifacts/", "/"]  # a run, and folders of `publish`
    if "/" in base.partition("://")[2] or "://" not in base:  # a host or bucket has no repositories beside it
        middles.append("-")
    found = {}
    for name, entry in FORMATS.items():
        for middle in middles:
            address = f"{base}{middle}{entry.artifact}"
            system, root = open_address(address)
            if name not in found and system.exists(locate(system, root, CHECKSUMS)):
                found[name] = address
    if format_name not in found:
        there = f"there are {', '.join(found)}" if found else "there is no artifact"
        raise RefusedInput(f"SOURCE {source}: holds no {format_name} with its {CHECKSUMS}; {there}")
    return found[format_name]


def fetch_artifact(source: str, folder: Path, progress: Progress = ignore_progress) -> Path:
    """Download the artifact at `source` into `folder` and return the folder.

    Files arrive in `folder`.partial. What an interrupted fetch left there is continued, in the middle of a file where
    the other side can send a part of one. `folder` appears when every file has its hash.

    Raises:
        RefusedInput: no SHA256SUMS at `source`, a path in it that is no plain name below the folder, or a `folder` that
            holds something else, cannot be written to, or shares files with the source. Nothing was written. Or a link
            was put into the folder meanwhile.
        DamagedData: a file at `source` is missing, or larger than was announced, or has another hash; or one in the
            `folder` of an earlier fetch has; or the folder was exchanged meanwhile.
        OSError: receiving was cut off.
    """
    from pipelines.commands.receive import receive_file
    from pipelines.commands.transfer import locate, open_address

    check_folder(source, folder)
    system, root = open_address(source)
    sums = read_checksums(system, locate(system, root, CHECKSUMS), source)
    hashes = parse_checksums(sums, source)
    check_names(hashes, source)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / CHECKSUMS).is_file() or (folder / CHECKSUMS).read_bytes() != sums.encode():
            raise RefusedInput(f"{folder} exists and holds something else; name another folder")
        verify_checksums(folder)
        return folder
    with atomic_write(folder, keep_partial=True) as partial:
        partial.mkdir(exist_ok=True)
        with Folder(partial) as inside:
            for i, (name, expected) in enumerate(hashes.items()):
                progress(name, i, len(hashes))
                receive_file(system, locate(system, root, name), inside, name, expected, CHECKSUMS)
            inside.write(CHECKSUMS, sums.encode())
            inside.remove_others({*hashes, CHECKSUMS})  # an earlier fetch of another artifact left them
            inside.require_in_place()
        if folder.exists():  # it is empty, and a folder cannot be renamed over another
            folder.rmdir()
    return folder


def check_folder(source: str, folder: Path) -> None:
    """Check that an artifact can be written to a folder.

    Raises:
        RefusedInput: the source is a path without a folder, or shares files with `folder`; `folder` is a link or no
            folder, or cannot be written to; or what an earlier fetch left holds something else than files.
    """
    from pipelines.commands.transfer import find_local_path

    name = "FOLDER"
    inputs.require_output_folder(name, folder)
    if folder.is_symlink():
        raise RefusedInput(f"{name} {folder}: is a link; name the folder it leads to, or a new one")
    partial = partial_path(folder)
    if partial.is_symlink():
        raise RefusedInput(f"{name} {partial}: is a link, and files are received there first; remove it")
    inputs.require_output_folder(name, partial)
    inputs.require_plain_content(name, partial)
    if (local := find_local_path(source)) is not None and inputs.find_mode("SOURCE", local) is not None:
        inputs.require_folder("SOURCE", local)
        for written in (folder, partial):
            inputs.require_apart(name, written, "SOURCE", local)


def read_checksums(system: "AbstractFileSystem", remote: str, source: str) -> str:
    """Return the text of SHA256SUMS at `source`.

    Raises:
        RefusedInput: it is not there, cannot be read, is too large, or is no text.
    """
    from pipelines.commands.receive import read_small_file
    from pipelines.commands.transfer import decode_checksums

    try:
        return decode_checksums(read_small_file(system, remote, MAX_CHECKSUMS_BYTES), source)
    except RefusedInput:
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise RefusedInput(f"{source} has no SHA256SUMS: no artifact, or not completely published") from error
    except Exception as error:
        # Each file system has errors of its own (aiohttp's, pyarrow's, the hub's), and nothing has started yet.
        raise RefusedInput(f"{source} cannot be read ({error or type(error).__name__}); correct the address") from error
