"""The data step of a team's first week: 12,000 files of five corpora on a hub, with a wrong column and two kills.

    python -m benchmarks.scale.fake_hub OUT [--files 12000] [--workers 2]

A hub on this machine serves the folders and formats of five corpora of the published recipes, each file a few rows. The
units are those of the published sizes, so that there are as many as there would be. The first call finds a column that
does not exist, before anything is read. Then the step is killed in its first and in its fourth step, goes on each time,
meets a file that fails three times, and its counts are compared with what was written. The script prints what happened.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from core.errors import RefusedInput
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import RemoteFiles
from data.config import DataConfig, TokenizerConfig

COMMIT = "0" * 40
PAGE_FILES = 1000
"""Files of one answer of the hub to a request for a list."""
SHARES = {
    "fineweb-edu": 0.75, "finemath": 0.1, "dolmino-math": 0.05, "open-math-instruct-2": 0.06, "nemotron-chat": 0.04,
}  # fmt: skip
"""Corpus -> its share of the files."""
ROWS = 8
WORDS = [
    "river", "engine", "market", "violin", "glacier", "harbour", "lantern", "orchard", "telescope", "village", "copper",
    "winter", "teacher", "garden", "bridge", "letter", "window", "forest", "paper", "sailor", "kitchen", "stone",
]  # fmt: skip
FAILURES = 3
"""How often the file that fails does so before it is served."""


def name_file(corpus: str, number: int) -> str:
    """Return the path of a file in its repository, as the catalogue's pattern wants it."""
    return {
        "fineweb-edu": f"data/CC-MAIN-{2013 + number % 12}-{number // 1000:02d}/train-{number:05d}.parquet",
        "finemath": f"finemath-3plus/train-{number:05d}.parquet",
        "dolmino-math": f"data/math/part/{number:05d}.json.zst",
        "open-math-instruct-2": f"data/train-{number:05d}.parquet",
        "nemotron-chat": f"data/chat-{number:05d}.parquet",
    }[corpus]


def make_rows(corpus: str, number: int) -> list[dict]:
    """Return the rows of a file. Those of different files differ in every sentence."""
    rng = random.Random(f"{corpus} {number}")

    def write(sentences: int) -> str:
        lines = []
        for _ in range(sentences):
            words = [rng.choice(WORDS) for _ in range(5)]
            lines.append(f"The {words[0]} of the {words[1]} that {words[2]} and the {words[3]} have with a {words[4]}.")
        return "\n".join(lines)

    if corpus == "open-math-instruct-2":
        return [{"problem": write(1), "generated_solution": write(2)} for _ in range(ROWS)]
    if corpus == "nemotron-chat":
        return [
            {"messages": [{"role": "user", "content": write(1)}, {"role": "assistant", "content": write(2)}]}
            for _ in range(ROWS)
        ]
    return [{"text": write(12)} for _ in range(ROWS)]


def make_content(corpus: str, number: int) -> bytes:
    """Return the bytes of a file."""
    rows = make_rows(corpus, number)
    if corpus == "dolmino-math":
        return zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that HfFileSystem reads data sets through."""

    repositories: dict[str, dict[str, bytes]]
    """Owner/name -> path -> content."""
    failing: tuple[str, str]
    """Repository and path of the file that fails."""
    failures: Counter[str]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """Answer as to a GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with a description, a page of a list, or a file or a part of it."""
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path).strip("/")
        if found := re.fullmatch(r"api/datasets/([^/]+/[^/]+)(?:/revision/main)?", path):
            self._answer_json({"id": found[1], "sha": COMMIT, "private": False, "siblings": []}, found[1])
        elif found := re.fullmatch(r"api/datasets/([^/]+/[^/]+)/tree/main/?(.*)", path):
            self._list(found[1], found[2], urllib.parse.parse_qs(url.query))
        elif found := re.fullmatch(r"datasets/([^/]+/[^/]+)/resolve/main/(.*)", path):
            self._send_file(found[1], found[2])
        else:
            self._answer(404, b"")

    def _list(self, repository: str, folder: str, query: dict[str, list[str]]) -> None:
        prefix = f"{folder}/" if folder else ""
        files = [name for name in self.repositories.get(repository, {}) if name.startswith(prefix)]
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        folders = sorted(
            {
                prefix + "/".join(rest[:depth])
                for name in files
                if (rest := name.removeprefix(prefix).split("/"))
                for depth in range(1, len(rest) if recursive else min(len(rest), 2))
            }
        )
        shown = sorted(name for name in files if recursive or "/" not in name.removeprefix(prefix))
        entries = [{"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in folders]
        for name in shown:
            size = len(self.repositories[repository][name])
            lfs = {"oid": hashlib.sha256(name.encode()).hexdigest(), "size": size, "pointerSize": 134}
            entries.append({"type": "file", "path": name, "oid": COMMIT, "size": size, "lfs": lfs})
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE_FILES < len(entries):
            rest = urllib.parse.urlencode({**{k: v[0] for k, v in query.items()}, "cursor": start + PAGE_FILES})
            host, path = self.headers["Host"], urllib.parse.urlsplit(self.path).path
            headers["Link"] = f'<http://{host}{path}?{rest}>; rel="next"'
        self._answer_json(entries[start : start + PAGE_FILES], repository, headers)

    def _send_file(self, repository: str, path: str) -> None:
        content = self.repositories.get(repository, {}).get(path)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if (repository, path) == self.failing and self.command == "GET" and self.failures[path] < FAILURES:
            self.failures[path] += 1
            self._answer(503, b"", {"Retry-After": "1"})
            return
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{path}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), int(wanted[2]) + 1 if wanted[2] else len(content)
            headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(content)}"
            self._answer(206, content[first:last], headers)
        else:
            self._answer(200, content, headers)

    def _answer_json(self, value: object, repository: str, headers: dict[str, str] | None = None) -> None:
        if repository not in self.repositories:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Print no line a request."""


class QuietServer(ThreadingHTTPServer):
    """A server that prints nothing of the connections that killed clients leave behind."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Print the error, unless the client has gone."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # its own two arguments


def serve(files: int) -> tuple[ThreadingHTTPServer, dict[str, int]]:
    """Serve the corpora at an address of this machine; return the server and the number of files by corpus."""
    counts = {corpus: round(files * share) for corpus, share in SHARES.items()}
    repositories: dict[str, dict[str, bytes]] = {}
    for corpus, count in counts.items():
        source = CATALOGUE[corpus].source
        assert isinstance(source, RemoteFiles)
        repository = source.address.removeprefix("hf://datasets/")
        contents = repositories.setdefault(repository, {})
        contents |= {name_file(corpus, number): make_content(corpus, number) for number in range(count)}
    failing = ("HuggingFaceFW/fineweb-edu", name_file("fineweb-edu", counts["fineweb-edu"] // 2))
    handler = type("Handler", (Hub,), {"repositories": repositories, "failing": failing, "failures": Counter()})
    server = QuietServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, counts


def prepare(out: Path, workers: int, column: str | None) -> None:
    """Run the data step, with another name for a column of finemath if one is given; called in a process of its own."""
    from core.progress import ignore_progress
    from data import pipeline

    if column:
        corpus = CATALOGUE["finemath"]
        assert isinstance(corpus.source, RemoteFiles)
        source = dataclasses.replace(corpus.source, columns=(column,))
        CATALOGUE["finemath"] = dataclasses.replace(corpus, source=source)
    config = DataConfig(
        corpora=tuple(SHARES), tokenizer=TokenizerConfig(train_vocab_size=1024), languages=(), workers=workers,
        near_duplicates_within="corpus", heldout_fraction=0.02, max_heldout_tokens=10**12,
    )  # fmt: skip
    try:
        pipeline.prepare(config, packages={}, benchmark_texts=None, out=out, progress=ignore_progress)
    except RefusedInput as error:
        print(f"refused: {error}", flush=True)
        sys.exit(2)


def run(out: Path, workers: int, column: str | None = None, kill_at: tuple[str, int] | None = None) -> int | None:
    """Run the data step in a process group of its own, and return its exit code.

    Args:
        kill_at: step and number of completed tasks at which the process and its workers are killed.
    """
    process = multiprocessing.get_context("spawn").Process(target=_run_in_group, args=(out, workers, column))
    started = time.monotonic()
    process.start()
    assert process.pid is not None
    while process.is_alive():
        process.join(0.2)
        if kill_at and len(list((out / "work/logs" / kill_at[0]).glob("completions/*"))) >= kill_at[1]:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    print(f"  exit code {process.exitcode} after {time.monotonic() - started:.0f} s", flush=True)
    return process.exitcode


def _run_in_group(out: Path, workers: int, column: str | None) -> None:
    os.setsid()
    prepare(out, workers, column)


def main() -> None:
    """Run all of it and check the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int, default=12_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    server, counts = serve(arguments.files)
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
    out = arguments.out.absolute()
    print(f"{sum(counts.values()):,} files: {counts}", flush=True)
    print("a wrong column:", flush=True)
    assert run(out, arguments.workers, column="content") == 2
    for step in ("1-read-and-filter", "4-near-signatures"):
        print(f"killed in step {step}:", flush=True)
        assert run(out, arguments.workers, kill_at=(step, arguments.files // 100)) == -signal.SIGKILL
    print("to the end:", flush=True)
    assert run(out, arguments.workers) == 0
    manifest = json.loads((out / "data_manifest.json").read_text(encoding="utf-8"))
    for name, count in counts.items():
        entry = manifest["corpora"][name]
        assert entry["read"] == count * ROWS, (name, entry["read"], count * ROWS)
        assert len(entry["inputs"]) == count and not entry["changed_inputs"]
        dropped = {label: sum(flow["dropped"].values()) for label, flow in entry["filters"].items()}
        print(f"  {name}: {entry['read']:,} rows of {count:,} files, {entry['kept']:,} kept, dropped {dropped}")
    print(f"  the failing file was refused {server.RequestHandlerClass.failures.total()} times")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
