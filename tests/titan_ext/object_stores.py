"""Object stores that run on this machine: each context serves a folder's files at an address for streaming."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import boto3
import google.auth
import huggingface_hub
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from moto.server import ThreadedMotoServer

GS_SERVER = """
import sys
from gcp_storage_emulator.server import create_server

server = create_server("127.0.0.1", 0, in_memory=True)
server.start()
print(server._api._httpd.server_address[1], flush=True)
sys.stdin.read()  # until the parent ends
"""


class Store(NamedTuple):
    """`address` of the folder; `put` replaces one of its files, `delete` removes it."""

    address: str
    put: callable
    delete: callable


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def s3(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Serve the folder through moto's S3 server."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        patch.setenv("S3_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="bucket")

        def put(name: str, content: bytes) -> None:
            client.put_object(Bucket="bucket", Key=f"run/{name}", Body=content)

        def delete(name: str) -> None:
            client.delete_object(Bucket="bucket", Key=f"run/{name}")

        for name, content in read_files(folder).items():
            put(name, content)
        yield Store("s3://bucket/run", put, delete)
    finally:
        server.stop()


@contextmanager
def gs(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """gcp-storage-emulator. It has no accounts: what Google's own client would be told by the machine is said here.

    It runs in a process of its own: pyarrow 26 holds the interpreter's lock while it opens a file of GcsFileSystem, so
    a server in a thread of this process would never answer.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", GS_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{int(server.stdout.readline())}")
        patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
        patch.setattr(google.auth, "default", lambda *args, **kwargs: (AnonymousCredentials(), "test"))
        bucket = storage.Client(project="test", credentials=AnonymousCredentials()).create_bucket("bucket")

        def put(name: str, content: bytes) -> None:
            bucket.blob(f"run/{name}").upload_from_string(content, "application/octet-stream")

        def delete(name: str) -> None:
            bucket.blob(f"run/{name}").delete()

        for name, content in read_files(folder).items():
            put(name, content)
        yield Store("gs://bucket/run", put, delete)
    finally:
        server.kill()
        server.wait()


@contextmanager
def hf(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Serve the folder as a hub does for hf_hub_download: HEAD and GET of resolve/, with the headers it needs."""
    files = read_files(folder)
    prefix = "/datasets/org/name/resolve/main/run/"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.removeprefix(prefix))
            self.send_response(200 if content is not None else 404)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
                content = b""
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        # The library reads the hub's address from the environment at import, which has happened already.
        patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        patch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield Store("hf://datasets/org/name/run", files.__setitem__, files.pop)
    finally:
        server.shutdown()


STORES = {"s3": s3, "gs": gs, "hf": hf}
