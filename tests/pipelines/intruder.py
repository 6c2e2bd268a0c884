"""Try what another user of the machine could try on a run's Ray, and print as JSON what came of it.

python -m tests.pipelines.intruder UID FOLDER TOKEN_FILE DASHBOARD GCS PID ...

It loads what it needs first and becomes the user then, since Python may lie where that user cannot read.
"""

import json
import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray._raylet import GcsClient


def attempt(act: Callable[[], Any]) -> str:
    """Return "done", or the error of a system call or of Ray in a word."""
    try:
        act()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except Exception as error:  # Ray's errors have no common class below this one
        return f"{type(error).__name__}: {error}"
    return "done"


def connect(path: Path) -> None:
    """Connect to a socket of the file system."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def submit(dashboard: str, token: str) -> None:
    """Submit a job over the dashboard."""
    body = json.dumps({"entrypoint": "true"}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    urllib.request.urlopen(urllib.request.Request(f"{dashboard}/api/jobs/", body, headers), timeout=20)


def read_object_store(pid: int) -> None:
    """Open the shared memory that a process has open."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if "plasma" in os.readlink(entry):
            entry.open("rb").close()


def main(user: int, folder: Path, token_file: Path, dashboard: str, gcs: str, pids: list[int]) -> None:
    """Become the user, then try everything."""
    sockets = [path for path in folder.rglob("*") if path.is_socket()]
    if user != os.getuid():
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    results = {
        "folder": [attempt(lambda: list(folder.iterdir()))],
        "token": [attempt(token_file.read_bytes)],
        "sockets": [attempt(lambda path=path: connect(path)) for path in sockets],
        "environment": [attempt(Path(f"/proc/{pid}/environ").read_bytes) for pid in pids],
        "object store": [attempt(lambda pid=pid: read_object_store(pid)) for pid in pids],
        "job": [attempt(lambda token=token: submit(dashboard, token)) for token in ("", "0" * 64)],
        "cluster": [attempt(lambda: GcsClient(address=gcs).internal_kv_get(b"any", None))],
    }
    print(json.dumps(results), flush=True)
    os._exit(0)  # Ray's client waits for a cluster that does not answer


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(Path, sys.argv[2:4]), *sys.argv[4:6], list(map(int, sys.argv[6:])))
