"""A stand-in of the Hugging Face hub on this machine, for one process of huggingface_hub: it serves folders as
repositories. Run as `python local_hub.py FOLDER [NAME ...]`, it prints its address and serves until it is killed. It
lists the further names in every repository, and gives each the content `{}`.
"""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_handler(root: Path, planted: list[str]):
    """Return the handler of requests for the repositories `root/<owner>/<name>`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, *, with_body):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repository = root / parts[2] / parts[3]
                if not repository.is_dir():
                    return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
                names = [str(path.relative_to(repository)) for path in sorted(repository.rglob("*")) if path.is_file()]
                names += planted
                found = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                return self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, with_body)
            owner, name, resolve, commit, *file = parts
            assert (resolve, commit) == ("resolve", COMMIT), self.path
            content = b"{}" if "/".join(file) in planted else root.joinpath(owner, name, *file).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self.send(200, content, headers, with_body)

        def send(self, status, content, headers, with_body):
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    return Handler


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(Path(sys.argv[1]), sys.argv[2:]))
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
