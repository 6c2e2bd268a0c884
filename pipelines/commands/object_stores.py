"""s3:// and gs:// for fsspec, through pyarrow's file systems.

fsspec's own, s3fs and gcsfs, do not install beside mosaicml-streaming 0.13: s3fs's aiobotocore wants an older botocore
than boto3 has, gcsfs a newer google-cloud-storage than mosaicml-streaming takes.

Accounts and endpoints are found as the data loader finds them. S3: AWS_ACCESS_KEY_ID and the other AWS_* variables,
~/.aws, the machine's role; S3_ENDPOINT_URL for a store that is not Amazon's. Google: the default credentials;
STORAGE_EMULATOR_HOST for an emulator, which has no accounts.
"""

import os
from datetime import timedelta
from typing import Any

from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow import fs

from core.errors import RefusedInput

PROTOCOLS = ("s3", "gs")
S3_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Environment variables with the address of a store that speaks S3's protocol; the first that is set counts."""
RETRY_LIMIT = timedelta(minutes=2)
"""Time that Google's client retries one request. Its own choice, 15 minutes, hides a wrong address."""


class ObjectStore(ArrowFSWrapper):
    """Objects as files; a path is bucket/key, and folders exist only as parts of keys."""

    cachable = False  # an instance reads the environment when it is made
    root_marker = ""  # fsspec would put "/" before a parent's path, which pyarrow refuses for buckets

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing. pyarrow would create an empty object for each folder."""

    def mkdirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing, as `makedirs`; fsspec's `put_file` calls this one."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Return bytes [start, end) of an object. The method of fsspec 2026.2.0 loses both and returns all of it."""
        if start is None and end is None:
            return super().cat_file(path, **kwargs)
        start = start or 0
        with self.open(path, "rb") as file:
            file.seek(start)
            return file.read() if end is None else file.read(end - start)


def open_object_store(protocol: str, bucket: str) -> ObjectStore:
    """Return the file system of "s3" or "gs" for a bucket, with the account that the environment gives.

    Raises:
        RefusedInput: Amazon does not know the bucket, or cannot be reached.
    """
    if protocol == "s3":
        endpoint = next((os.environ[name] for name in S3_ENDPOINTS if os.environ.get(name)), None)
        # A bucket of Amazon's answers in its own region only; another store has no region, or takes any.
        try:
            region = None if endpoint else fs.resolve_s3_region(bucket)
        except OSError as error:
            raise RefusedInput(f"s3://{bucket}: {error}; correct the address") from error
        return ObjectStore(fs.S3FileSystem(endpoint_override=endpoint, region=region))
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator is None:
        return ObjectStore(fs.GcsFileSystem(retry_time_limit=RETRY_LIMIT))
    scheme, _, host = emulator.rpartition("://")
    system = fs.GcsFileSystem(
        anonymous=True, scheme=scheme or "http", endpoint_override=host, retry_time_limit=RETRY_LIMIT
    )
    return ObjectStore(system)
