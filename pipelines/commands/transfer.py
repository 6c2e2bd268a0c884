"""The parts that `publish` and `fetch` share: file systems by address, SHA256SUMS, hashes of remote files."""

import hashlib

import fsspec
from fsspec import AbstractFileSystem

from core.errors import RefusedInput
from eval.export.artifact_folder import CHECKSUMS
from pipelines.commands.object_stores import PROTOCOLS, open_object_store

READ_BYTES = 8 << 20


def open_address(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the address as a path in it.

    Raises:
        RefusedInput: the protocol is unknown, its package is not installed, or it is SSH.
    """
    protocol, path = fsspec.core.split_protocol(address)
    if protocol in PROTOCOLS:
        path = path.strip("/")
        return open_object_store(protocol, path.partition("/")[0]), path
    if protocol in ("ssh", "sftp"):
        # fsspec's SFTPFileSystem takes whatever host key it is shown, and has no option to verify it.
        raise RefusedInput(
            f"{address}: not over SSH, since fsspec's SFTP does not verify the host's key; copy the folder with rsync "
            f"or scp, and check it with `sha256sum --check {CHECKSUMS}`"
        )
    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise RefusedInput(f"{address}: {error}") from error
    return system, path.rstrip("/")


def open_for_writing(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the address as a path in it.

    Raises:
        RefusedInput: as `open_address`; or http, which has no way to write; or a bucket that does not exist.
    """
    system, root = open_address(address)
    if "http" in system.protocol:
        raise RefusedInput(f"{address}: http addresses can be fetched from but not published to")
    if fsspec.core.split_protocol(address)[0] in PROTOCOLS:
        bucket = root.partition("/")[0]
        if not system.exists(bucket):
            raise RefusedInput(f"{address}: there is no bucket {bucket!r}; create it, or correct the address")
    return system, root


def hash_remote_file(system: AbstractFileSystem, remote: str) -> str:
    """Return the SHA-256 of a file on any file system, hexadecimal."""
    digest = hashlib.sha256()
    with system.open(remote, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
