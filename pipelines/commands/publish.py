"""`mobilemoe publish`: artifact folders to an address, verified and resumable.

An artifact is a folder with a SHA256SUMS over its files. That file is sent last: as long as it is missing at the
destination, nothing there counts as published.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from core.checksums import CHECKSUMS, parse_checksums, verify_checksums
from core.errors import DamagedData, RefusedInput
from core.inside import PARTIAL, check_names
from core.progress import Progress, ignore_progress, print_progress
from pipelines.commands import inputs
from pipelines.commands.command import emit_result
from pipelines.preflight import find_existing_parent

Layout = Literal["folders", "repositories"]


@dataclass(frozen=True)
class Publish:
    """Send an artifact folder, or all artifacts of a run, to an address; verified, and resumed when called again."""

    source: tyro.conf.Positional[Path]
    """Artifact folder, or run. Links in it are followed; what arrives are files."""
    destination: tyro.conf.Positional[str]
    """Path or address: s3://, gs://, hf://. It is new, empty, or holds (a part of) this artifact, and lies outside of
    the source."""
    layout: Layout = "folders"
    """Where the artifacts of a run go: DESTINATION/int4, or DESTINATION-int4, as model hubs have a repository for each
    format. Repositories must exist."""
    json: bool = False
    """One JSON object on stdout."""


def publish(arguments: Publish) -> None:
    """Publish and print the addresses of the folders that are now complete.

    Raises:
        RefusedInput, DamagedData: as `publish_artifacts`.
        TransferFailed: sending was cut off.
    """
    from pipelines.commands.transfer import name_failures

    with name_failures(arguments.destination):
        addresses = publish_artifacts(
            arguments.source, arguments.destination, arguments.layout, progress=print_progress
        )
    emit_result(arguments.json, {"published": addresses}, lambda: "published: " + ", ".join(addresses))


def publish_artifacts(
    source: Path, destination: str, layout: Layout = "folders", *, progress: Progress = ignore_progress
) -> list[str]:
    """Send an artifact folder, or each artifact of a run's `artifacts/`, to `destination`.

    A file that is there with the right hash is not sent again; every file that was sent is read back.

    Args:
        source: a folder with SHA256SUMS, which becomes `destination`; or a run.
        destination: a path or an address such as s3://bucket/models, gs:// or hf://.
        layout: whether the artifacts of a run become folders in `destination`, or stand beside it as DESTINATION-NAME.

    Returns:
        The addresses of the folders that are now complete.

    Raises:
        RefusedInput: there is no artifact, the address cannot be written to, holds something else, or shares files with
            the source. Nothing was sent.
        DamagedData: a file of the artifact has another hash than SHA256SUMS says, or reads back with another one.
        OSError: sending was cut off.
    """
    from pipelines.commands.transfer import decode_checksums

    folders = find_artifacts(source, destination, layout)
    for address, folder in folders.items():
        with inputs.refuse_os_errors("SOURCE"):
            decode_checksums((folder / CHECKSUMS).read_bytes(), str(folder))
            verify_checksums(folder)
        check_destination(source, folder, address)
    for address, folder in folders.items():
        _send_folder(folder, address, progress)
    return list(folders)


def find_artifacts(source: Path, destination: str, layout: Layout) -> dict[str, Path]:
    """Return address -> folder of each artifact to send.

    Raises:
        RefusedInput: the source is no folder, or holds no artifact, or one whose name some systems cannot hold.
    """
    inputs.require_folder("SOURCE", source)
    # The slashes of `s3://` alone stay: without them it would be a folder.
    address = destination if destination.endswith("://") else destination.rstrip("/") or "/"
    if (source / CHECKSUMS).is_file():
        return {address: source}
    found = sorted(path.parent for path in source.glob(f"artifacts/*/{CHECKSUMS}"))
    complete = [folder for folder in found if folder.suffix != ".partial"]
    if not complete:
        raise RefusedInput(f"{source}: neither an artifact ({CHECKSUMS}) nor a run with artifacts/; export one first")
    check_names([folder.name for folder in complete], str(source))
    mark = "/" if layout == "folders" else "-"
    return {f"{address}{mark}{folder.name}": folder for folder in complete}


def check_destination(source: Path, folder: Path, address: str) -> None:
    """Check that an artifact can go to an address.

    Args:
        source: what the user named, the artifact or its run.
        folder: the artifact.

    Raises:
        RefusedInput: the address cannot be written to, shares files with the source, has no room, or holds anything
            that this artifact does not have.
    """
    from pipelines.commands.transfer import find_local_path, locate, open_for_writing

    sums = (folder / CHECKSUMS).read_bytes()
    names = parse_checksums(sums.decode(), str(folder))
    check_names(names, str(folder))
    if (local := find_local_path(address)) is not None:
        check_local_destination(source, folder, local, {*names, CHECKSUMS})
    system, root = open_for_writing(address)
    published = locate(system, root, CHECKSUMS)
    if system.exists(published) and system.cat_file(published) != sums:
        raise RefusedInput(f"{address} holds another artifact; name another address, or remove it there")


def check_local_destination(source: Path, folder: Path, local: Path, names: set[str]) -> None:
    """Check a destination on this machine, as `check_destination` does.

    Args:
        names: files of the artifact, by their paths in it.
    """
    name = "DESTINATION"
    for given in (source, folder):
        # The artifacts of a run may become folders beside it, so the run may lie in what contains them.
        inputs.require_apart(name, local, "SOURCE", given)
    inputs.require_output_folder(name, local)
    inputs.require_plain_content(name, local)
    there = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    if foreign := sorted(there - names - {file + PARTIAL for file in names}):
        raise RefusedInput(
            f"{name} {local}: holds {foreign[0]}, which is no file of {folder}; name an empty folder, or a new one"
        )
    needed = sum((folder / path).stat().st_size for path in names - there)
    anchor = find_existing_parent(local.absolute())
    if needed > (free := shutil.disk_usage(anchor).free):
        raise RefusedInput(
            f"{name} {local}: {needed / 1e9:,.2f} GB are to be written, and the file system of {anchor} has "
            f"{free / 1e9:,.2f} GB free; free some space, or name a folder on a larger one"
        )


def _send_folder(folder: Path, address: str, progress: Progress) -> None:
    from pipelines.commands.transfer import hash_remote_file, locate, open_destination, open_for_writing

    system, root = open_for_writing(address)
    hashes = parse_checksums((folder / CHECKSUMS).read_text(encoding="utf-8"), str(folder))
    with open_destination(address, system, root) as send:
        for i, (name, expected) in enumerate(hashes.items()):
            progress(f"{address}/{name}", i, len(hashes))
            remote = locate(system, root, name)
            if system.exists(remote) and hash_remote_file(system, remote) == expected:
                continue
            send(folder / name, name)
            if (found := hash_remote_file(system, remote)) != expected:
                raise DamagedData(
                    f"{address}/{name} reads back with SHA-256 {found}, sent was {expected}; publish again"
                )
        send(folder / CHECKSUMS, CHECKSUMS)
