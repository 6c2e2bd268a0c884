"""A model hub on this machine: the part of the Hub's API that HfFileSystem reads and commits through."""

import base64
import hashlib
import json
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
from huggingface_hub import HfFileSystem

REPOSITORY, COMMIT = "org/name", "0" * 40


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._file(urllib.parse.unquote(self.path.removeprefix(f"/{REPOSITORY}/resolve/main/")))

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        api = f"/api/models/{REPOSITORY}"
        if path in (api, f"{api}/revision/main"):
            self._json({"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "private": False, "siblings": []})
        elif path.startswith(f"{api}/tree/main"):
            self._tree(urllib.parse.unquote(path.removeprefix(f"{api}/tree/main")).strip("/"))
        else:
            self.do_HEAD()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        elif self.path.split("?")[0].endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitOid": COMMIT, "commitUrl": f"https://huggingface.co/{REPOSITORY}/commit/{COMMIT}"})
        else:
            self._answer(404, b"")

    def _tree(self, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): c for path, c in self.files.items() if path.startswith(prefix)}
        if folder and not inside:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        entries = [
            {"type": "file", "path": prefix + path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in inside.items()
            if "/" not in path
        ]
        folders = {path.split("/")[0] for path in inside if "/" in path}
        entries += [{"type": "directory", "path": prefix + path, "oid": COMMIT, "size": 0} for path in sorted(folders)]
        self._json(entries)

    def _file(self, path: str) -> None:
        content = self.files.get(path)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            part = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
            self._answer(206, part, headers)
        else:
            self._answer(200, content, headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def serve(patch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """An empty model repository; the files that have been committed to it, by path."""
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files}))
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        # Read from the environment when the library is imported, which has happened.
        patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        patch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE",
                      endpoint + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        patch.setenv("HF_TOKEN", "hf_test")
        HfFileSystem.clear_instance_cache()
        yield files
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
