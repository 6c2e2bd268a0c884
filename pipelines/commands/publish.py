"""`mobilemoe publish`: artifact folders to an address, verified and resumable.

An artifact is a folder with a SHA256SUMS over its files. That file is sent last: as long as it is missing at the
destination, nothing there counts as published.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from core.errors import DamagedData, RefusedInput
from core.progress import Progress, ignore_progress, print_progress
from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Publish:
    """Send an artifact folder, or all artifacts of a run, to an address; verified, and resumed when called again."""

    source: tyro.conf.Positional[Path]
    """Artifact folder, or run."""
    destination: tyro.conf.Positional[str]
    """Path or address: s3://, gs://, hf://."""
    json: bool = False
    """One JSON object on stdout."""


def publish(arguments: Publish) -> None:
    """Publish and print the addresses of the folders that are now complete.

    Raises:
        RefusedInput, DamagedData: as `publish_artifacts`.
    """
    addresses = publish_artifacts(arguments.source, arguments.destination, print_progress)
    emit_result(arguments.json, {"published": addresses}, lambda: "published: " + ", ".join(addresses))


def publish_artifacts(source: Path, destination: str, progress: Progress = ignore_progress) -> list[str]:
    """Send an artifact folder, or each artifact of a run's `artifacts/`, to `destination`.

    A file that is there with the right hash is not sent again; every file that was sent is read back.

    Args:
        source: a folder with SHA256SUMS, which becomes `destination`; or a run, whose artifacts become folders in it.
        destination: a path or an address such as s3://bucket/models, gs:// or hf://.

    Returns:
        The addresses of the folders that are now complete.

    Raises:
        RefusedInput: there is no artifact, or the address cannot be written to.
        DamagedData: a file of the artifact has another hash than SHA256SUMS says, or reads back with another one.
    """
    from eval.export.artifact_folder import CHECKSUMS, verify_checksums

    folders = {destination.rstrip("/"): source}
    if not (source / CHECKSUMS).is_file():
        found = sorted(path.parent for path in source.glob(f"artifacts/*/{CHECKSUMS}"))
        if not found:
            raise RefusedInput(
                f"{source}: neither an artifact ({CHECKSUMS}) nor a run with artifacts/; export one first"
            )
        folders = {f"{destination.rstrip('/')}/{folder.name}": folder for folder in found}
    for address, folder in folders.items():
        verify_checksums(folder)
        _send_folder(folder, address, progress)
    return list(folders)


def _send_folder(folder: Path, address: str, progress: Progress) -> None:
    from eval.export.artifact_folder import CHECKSUMS, parse_checksums
    from pipelines.commands.transfer import hash_remote_file, open_for_writing

    system, root = open_for_writing(address)
    hashes = parse_checksums((folder / CHECKSUMS).read_text(), str(folder))
    for i, (name, expected) in enumerate(hashes.items()):
        progress(f"{address}/{name}", i, len(hashes))
        remote = f"{root}/{name}"
        if system.exists(remote) and hash_remote_file(system, remote) == expected:
            continue
        system.makedirs(remote.rpartition("/")[0], exist_ok=True)
        system.put_file(str(folder / name), remote)
        if (found := hash_remote_file(system, remote)) != expected:
            raise DamagedData(f"{address}/{name} reads back with SHA-256 {found}, sent was {expected}; publish again")
    system.put_file(str(folder / CHECKSUMS), f"{root}/{CHECKSUMS}")
