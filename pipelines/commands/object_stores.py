"""s3:// and gs:// for fsspec over boto3 and google-cloud-storage, which mosaicml-streaming brings along.

fsspec's own, s3fs and gcsfs, do not install beside it: s3fs's aiobotocore wants an older botocore than boto3 has,
gcsfs a newer google-cloud-storage than mosaicml-streaming takes. Here is what publishing and fetching ask of a file
system: sizes, ranges, whole files. Accounts and endpoints are found as the loader finds them: AWS_* and
S3_ENDPOINT_URL, Google's default credentials.
"""

import os
from abc import abstractmethod
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from core.errors import RefusedInput


class ObjectStore(AbstractFileSystem):
    """Objects as files; a path is bucket/key. Folders are nothing of their own."""

    cachable = False  # clients read the environment when they are made

    @abstractmethod
    def size_of(self, bucket: str, key: str) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""

    @abstractmethod
    def read_range(self, bucket: str, key: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of an object, end > start."""

    @abstractmethod
    def upload(self, local: str, bucket: str, key: str) -> None:
        """Send a file; the object appears when it is complete. ValueError where the store refuses it."""

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        return {"name": path, "size": self.size_of(*split(path)), "type": "file"}

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self.upload(lpath, *split(self._strip_protocol(rpath)))

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> "_Object":
        return _Object(self, path, mode, block_size or "default")


class _Object(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.read_range(*split(self.path), start, end) if end > start else b""


def split(path: str) -> tuple[str, str]:
    """Bucket and key of a path.

    Raises:
        RefusedInput: one of them is missing.
    """
    bucket, _, key = path.partition("/")
    if not bucket or not key:
        raise RefusedInput(f"{path!r} names no object; give an address like s3://bucket/folder")
    return bucket, key


class S3FileSystem(ObjectStore):
    """Amazon S3, and stores that speak its protocol."""

    protocol = "s3"

    def __init__(self, **options: Any):
        import boto3

        super().__init__(**options)
        self._client = boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))

    def size_of(self, bucket: str, key: str) -> int:
        from botocore.exceptions import ClientError

        try:
            return self._client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NoSuchBucket"):
                raise FileNotFoundError(f"s3://{bucket}/{key}") from error
            raise

    def read_range(self, bucket: str, key: str, start: int, end: int) -> bytes:
        return self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")["Body"].read()

    def upload(self, local: str, bucket: str, key: str) -> None:
        from boto3.exceptions import S3UploadFailedError

        try:
            self._client.upload_file(local, bucket, key)
        except S3UploadFailedError as error:
            raise RefusedInput(f"s3://{bucket}/{key} cannot be written: {error}; check the bucket's name") from error


class GSFileSystem(ObjectStore):
    """Google Cloud Storage."""

    protocol = "gs"

    def __init__(self, **options: Any):
        from google.cloud import storage

        super().__init__(**options)
        self._client = storage.Client()

    def size_of(self, bucket: str, key: str) -> int:
        blob = self._client.bucket(bucket).get_blob(key)
        if blob is None:
            raise FileNotFoundError(f"gs://{bucket}/{key}")
        return blob.size

    def read_range(self, bucket: str, key: str, start: int, end: int) -> bytes:
        return self._client.bucket(bucket).blob(key).download_as_bytes(start=start, end=end - 1)

    def upload(self, local: str, bucket: str, key: str) -> None:
        from google.api_core.exceptions import ClientError

        try:
            self._client.bucket(bucket).blob(key).upload_from_filename(local)
        except ClientError as error:
            raise RefusedInput(f"gs://{bucket}/{key} cannot be written: {error}; check the bucket's name") from error


for _kind in (S3FileSystem, GSFileSystem):
    fsspec.register_implementation(_kind.protocol, _kind, clobber=True)
