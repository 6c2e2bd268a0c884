"""The parts that `publish` and `fetch` share: file systems by address, SHA256SUMS, hashes of remote files."""

import hashlib
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from core.checksums import CHECKSUMS
from core.errors import RefusedInput, TransferFailed
from core.inside import Folder
from core.secret_keys import hide_keys, holds_key
from pipelines.commands.object_stores import PROTOCOLS, open_object_store

READ_BYTES = 8 << 20


def find_local_path(address: str) -> Path | None:
    """Return the path that an address means on this machine, file://PATH included; None for any other address.

    Whatever has no `://` is a path as it is. fsspec would take `::` for two addresses and `data:` for content.
    """
    protocol, mark, rest = address.partition("://")
    if not mark:
        return Path(address)
    return Path(rest) if protocol in ("file", "local") else None


def open_address(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the address as a path in it, without a slash at its end.

    Raises:
        RefusedInput: the protocol is unknown, its package is not installed, or it is SSH; the address names no host or
            bucket, has parts that are no names, or holds a key; it is http with a query.
    """
    refuse_keys(address)
    if (local := find_local_path(address)) is not None:
        return LocalFileSystem(), str(local.absolute())
    protocol, path = address.split("://", 1)
    if len(protocol) < 2:
        raise RefusedInput(f"{address}: give PROTOCOL://..., such as s3://, or a path")
    if protocol in PROTOCOLS:
        path = path.strip("/")
        if any(part in ("", ".", "..") for part in path.split("/")):
            raise RefusedInput(f"{address}: give {protocol}://BUCKET/NAME/..., without empty parts, `.` or `..`")
        return open_object_store(protocol, path.partition("/")[0]), path
    if protocol in ("http", "https"):
        parts = urllib.parse.urlsplit(address)
        if not parts.netloc or "?" in address or "#" in address:
            raise RefusedInput(f"{address}: give {protocol}://HOST/FOLDER, without a query (?) or fragment (#)")
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


def refuse_keys(address: str) -> None:
    """Refuse an address that holds a key: the manifest, the indexes of the shards and every log keep addresses.

    Raises:
        RefusedInput: it does; the message shows the address without it.
    """
    if holds_key(address):
        raise RefusedInput(
            f"{hide_keys(address)}: an address is kept in manifests and logs, so it must not hold a key, a password or "
            "a signature; leave it out and give the key as the library reads it, in AWS_SECRET_ACCESS_KEY, HF_TOKEN, "
            "~/.netrc, ..."
        )


def open_for_writing(address: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of an address, and the address as a path in it.

    Raises:
        RefusedInput: as `open_address`; or http, which has no way to write; or a bucket or repository that does not
            exist.
    """
    system, root = open_address(address)
    if "http" in system.protocol:
        raise RefusedInput(f"{address}: http addresses can be fetched from but not published to")
    if fsspec.core.split_protocol(address)[0] in PROTOCOLS:
        bucket = root.partition("/")[0]
        if not system.exists(bucket):
            raise RefusedInput(f"{address}: there is no bucket {bucket!r}; create it, or correct the address")
    if "hf" in system.protocol:
        repository = "/".join(root.split("/")[:2])
        if not system.exists(repository):
            raise RefusedInput(
                f"{address}: there is no repository {repository}; `hf repo create {repository}`, or correct the address"
            )
    return system, root


def locate(system: AbstractFileSystem, root: str, name: str) -> str:
    """Return the path of an artifact's file below its address. In a URL, `#`, `?` and `%` of a name are escaped."""
    return f"{root}/{urllib.parse.quote(name) if 'http' in system.protocol else name}"


@contextmanager
def open_destination(address: str, system: AbstractFileSystem, root: str) -> Iterator[Callable[[Path, str], None]]:
    """Yield the function that sends a file of this machine to a name below an address.

    On this machine a file appears whole, and no link below the address is followed, also none that somebody puts there
    meanwhile.

    Raises:
        RefusedInput: the function was given a name that is not a plain one, or found a link on its way.
        DamagedData: the folder of the address was exchanged meanwhile.
    """

    def send(path: Path, name: str) -> None:
        remote = locate(system, root, name)
        system.makedirs(remote.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), remote)

    if (local := find_local_path(address)) is None:
        yield send
        return
    local.mkdir(parents=True, exist_ok=True)
    with Folder(local.absolute(), follow=True) as folder:

        def write(path: Path, name: str) -> None:
            folder.copy(path, name)
            folder.require_in_place()

        yield write


def decode_checksums(content: bytes, where: str) -> str:
    """Return the text of a SHA256SUMS; raise RefusedInput if it is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RefusedInput(f"{where}/{CHECKSUMS} is no text in UTF-8 ({error}); have it published again") from error


@contextmanager
def name_failures(address: str) -> Iterator[None]:
    """Turn an OSError of the block, a transfer that has begun, into a TransferFailed that names the address."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != address else ""
        raise TransferFailed(
            f"{address}: {error.strerror or error}{where}; the same command continues once that is mended"
        ) from error


def hash_remote_file(system: AbstractFileSystem, remote: str) -> str:
    """Return the SHA-256 of a file on any file system, hexadecimal."""
    digest = hashlib.sha256()
    with system.open(remote, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
