"""Sources and destinations that mean harm: links that were planted, names that lead elsewhere, sizes that are not held.

Every test has a folder of the user's that must stay as it is.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.checksums import CHECKSUMS, write_checksums
from core.errors import RefusedInput
from pipelines.cli import DONE, FAILED, REFUSED, main
from pipelines.commands import receive
from pipelines.commands.fetch import MAX_CHECKSUMS_BYTES, fetch_artifact
from pipelines.commands.publish import publish_artifacts
from pipelines.commands.transfer import open_destination
from pipelines.shared_data import SharedData, receive_data, send_data

WHOLE = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def victim(tmp_path) -> Iterator[Path]:
    """A folder of the user's, which nothing may change."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "keys").write_bytes(b"mine")
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"keys": b"mine"}


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "weights").write_bytes(WHOLE)
    write_checksums(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["hard link", "link"])
def test_a_fetch_does_not_continue_in_the_file_of_another(kind, artifact, tmp_path, victim, capsys):
    """Bytes appended to a partial file that leads to another file would arrive there."""
    part = tmp_path / "back.partial/sub/weights.partial"
    part.parent.mkdir(parents=True)
    (part.hardlink_to if kind == "hard link" else part.symlink_to)(victim / "keys")
    assert main(["fetch", str(artifact), str(tmp_path / "back")]) == REFUSED
    said = capsys.readouterr().err
    assert str(part) in said and ("hard links" in said or "is a link" in said) and "remove it" in said
    part.unlink()
    assert main(["fetch", str(artifact), str(tmp_path / "back")]) == DONE
    assert files(tmp_path / "back") == files(artifact)


@pytest.mark.parametrize("kind", ["hard link", "link"])
@pytest.mark.parametrize("name", ["sub/weights", "sub/weights.partial", CHECKSUMS, f"{CHECKSUMS}.partial"])
def test_publishing_does_not_write_into_the_file_of_another(kind, name, artifact, tmp_path, victim, capsys):
    """A link is refused when the destination is looked at. A second name of a file is replaced, not written to."""
    place = tmp_path / "shelf" / name
    place.parent.mkdir(parents=True)
    (place.hardlink_to if kind == "hard link" else place.symlink_to)(victim / "keys")
    if kind == "link" or name == CHECKSUMS:  # a SHA256SUMS with another content is another artifact's
        assert main(["publish", str(artifact), str(tmp_path / "shelf")]) == REFUSED
        assert ("is a link; remove it" if kind == "link" else "holds another artifact") in capsys.readouterr().err
        return
    assert main(["publish", str(artifact), str(tmp_path / "shelf")]) == DONE
    assert files(tmp_path / "shelf") == files(artifact)


@pytest.mark.parametrize("command", ["fetch", "publish"])
@pytest.mark.parametrize("what", ["the folder", "a folder in it", "a file in it"])
def test_a_destination_that_is_exchanged_meanwhile(what, command, artifact, tmp_path, victim, monkeypatch):
    """Somebody puts a link in place when the first file has arrived."""
    out = tmp_path / ("back.partial" if command == "fetch" else "shelf")

    def exchange(done: int) -> None:
        if done != 1:
            return
        if what == "the folder":
            out.rename(tmp_path / "away")
            out.symlink_to(victim)
        elif what == "a folder in it":
            (out / "sub").symlink_to(victim)
        else:
            (out / "sub").mkdir()
            (out / "sub/weights.partial").symlink_to(victim / "keys")

    def act() -> None:
        if command == "fetch":
            fetch_artifact(str(artifact), tmp_path / "back", lambda phase, done, total: exchange(done))
        else:
            publish_artifacts(artifact, str(out), progress=lambda phase, done, total: exchange(done))

    if what == "a file in it" and command == "publish":
        act()  # replaced, as any other file
        assert files(out) == files(artifact)
        return
    expected = "put in its place while it was written" if what == "the folder" else "is a link"
    with pytest.raises((RefusedInput, RuntimeError), match=expected):
        act()
    assert not (tmp_path / "back").exists()


NAMES = {
    "../private/keys": "`..`", "sub/../../private/keys": "`..`", "{tmp}/private/keys": "absolute", "NUL": "device",
    "a\\b": "backslash", "a:b": "colon", "a\0b": "control", "a\x1bb": "control", "a.": "dot",
    "/".join(["d"] * 1000): "parts",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_a_checksum_file(name, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    line = f"{hashlib.sha256(b'').hexdigest()}  {name.format(tmp=tmp_path)}\n"
    (tmp_path / "source" / CHECKSUMS).write_text(line)
    assert main(["fetch", str(tmp_path / "source"), str(tmp_path / "back")]) == REFUSED
    said = capsys.readouterr().err
    assert f"{CHECKSUMS}, line 1" in said and NAMES[name] in said and "rename it there" in said
    assert not (tmp_path / "back.partial").exists()


def write_data_set(folder: Path, place: str, name: str) -> SharedData:
    """Write a data set of one held-out domain whose manifest or index gives a file this name; hashes fit."""
    names = {"tokenizer": "tokenizer.json", "domain": "web", "shard": "web.00000.mds.zstd"} | {place: name}
    entry = {"basename": names["shard"], "bytes": 1, "hashes": {"sha256": hashlib.sha256(b"shard").hexdigest()}}
    entry["hashes"]["xxh64"] = "0" * 16
    shard = {
        "samples": 1, "raw_data": {"basename": "web.00000.mds", "bytes": 1, "hashes": {"xxh64": "0" * 16}},
        "zip_data": entry, "column_names": ["tokens"], "column_encodings": ["ndarray:uint32"],
    }  # fmt: skip
    index = json.dumps({"version": 2, "shards": [shard]}).encode()
    contents = {"tokenizer/tokenizer.json": b"{}", "heldout/pretrain/web/index.json": index, "statistics.html": b"page"}
    contents["heldout/pretrain/web/web.00000.mds.zstd"] = b"shard"
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    manifest = {
        "plan": {}, "shards": {}, "tokenizer": {"files": {names["tokenizer"]: hashlib.sha256(b"{}").hexdigest()}},
        "heldout": {"pretrain": {names["domain"]: {"index_sha256": hashlib.sha256(index).hexdigest()}}},
    }  # fmt: skip
    (folder / "data_manifest.json").write_text(json.dumps(manifest))
    return SharedData(str(folder), json.dumps(manifest).encode())


def quietly(*_: object) -> None:
    """Report no progress."""


def test_a_data_set_with_plain_names_is_received(tmp_path):
    shared = write_data_set(tmp_path / "set", "shard", "web.00000.mds.zstd")
    receive_data(shared, tmp_path / "data", quietly)
    assert (tmp_path / "data/heldout/pretrain/web/web.00000.mds.zstd").read_bytes() == b"shard"
    assert (tmp_path / "data/statistics.html").read_bytes() == b"page"


@pytest.mark.parametrize("place", ["tokenizer", "domain", "shard"])
@pytest.mark.parametrize("name", [name for name in NAMES if "\\" not in name])
def test_names_of_a_data_set(name, place, tmp_path):
    shared = write_data_set(tmp_path / "set", place, name.format(tmp=tmp_path))
    with pytest.raises(RefusedInput, match=r"is not a plain path|does not lie beside"):
        receive_data(shared, tmp_path / "data", quietly)
    with pytest.raises((RefusedInput, FileNotFoundError, ValueError)):
        send_data(tmp_path / "set", str(tmp_path / "sent"), quietly)
    assert not (tmp_path / "data/data_manifest.json").exists() and not (tmp_path / "sent").exists()


@pytest.mark.parametrize("kind", ["file", "hard link", "folder"])
def test_a_data_set_is_not_received_through_links(kind, tmp_path, victim):
    shared = write_data_set(tmp_path / "set", "shard", "web.00000.mds.zstd")
    place = tmp_path / "data/heldout/pretrain/web"
    place.parent.mkdir(parents=True)
    if kind == "folder":
        place.symlink_to(victim)
    else:
        place.mkdir()
        part = place / "web.00000.mds.zstd.partial"
        (part.symlink_to if kind == "file" else part.hardlink_to)(victim / "keys")
    with pytest.raises(RefusedInput, match="remove it and call again"):
        receive_data(shared, tmp_path / "data", quietly)


def test_a_data_set_is_not_sent_through_links(tmp_path, victim):
    write_data_set(tmp_path / "set", "shard", "web.00000.mds.zstd")
    (tmp_path / "sent/heldout").mkdir(parents=True)
    (tmp_path / "sent/heldout/pretrain").symlink_to(victim)
    with pytest.raises(RefusedInput, match="is a link"):
        send_data(tmp_path / "set", str(tmp_path / "sent"), quietly)


class Server(BaseHTTPRequestHandler):
    """Serves `contents`: name -> (announced size, or None, and the blocks that are sent)."""

    contents: dict[str, tuple[int | None, list[bytes] | None]]

    def do_HEAD(self) -> bool:
        announced, _ = self.contents[self.path.rpartition("/")[2]]
        self.send_response(200)
        if announced is not None:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        return True

    def do_GET(self) -> None:
        announced, blocks = self.contents[self.path.rpartition("/")[2]]
        self.send_response(200)
        # A length would end the reading on the other side: this one ends when the connection does.
        if announced is not None and blocks is not None and sum(map(len, blocks)) <= announced:
            self.send_header("Content-Length", str(announced))
        self.end_headers()
        try:
            for block in blocks if blocks is not None else iter(lambda: bytes(1 << 20), None):
                self.wfile.write(block)
        except OSError:
            pass  # the other side has closed the connection, as it should

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def serve():
    """Return a function that serves contents over HTTP and returns the address."""
    servers = []

    def start(contents: dict) -> str:
        handler = type("Handler", (Server,), {"contents": contents})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/x"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


SIZES = {
    "as announced": (len(WHOLE), [WHOLE], DONE, ""),
    "nothing announced": (None, [WHOLE], DONE, ""),
    "more than announced": (len(WHOLE), [WHOLE, b"x"], FAILED, r"sends more than the 10,240 bytes that were announced"),
    "never ends": (len(WHOLE), None, FAILED, "sends more than the 10,240 bytes that were announced"),
    "never ends, nothing announced": (None, None, FAILED, "that a file may have without saying its size"),
    "less than announced": (len(WHOLE) + 5, [WHOLE], FAILED, "the same command continues"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_held(case, serve, tmp_path, capsys, monkeypatch):
    announced, blocks, code, message = SIZES[case]
    monkeypatch.setattr(receive, "MAX_UNANNOUNCED_BYTES", 1 << 24)
    sums = f"{hashlib.sha256(WHOLE).hexdigest()}  weights\n".encode()
    address = serve({CHECKSUMS: (len(sums), [sums]), "weights": (announced, blocks)})
    assert main(["fetch", address, str(tmp_path / "back")]) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    if code == DONE:
        assert (tmp_path / "back/weights").read_bytes() == WHOLE
    elif "more than" in message or "without" in message:
        assert "weights" in said and not list((tmp_path / "back.partial").iterdir()), "nothing of it is kept"


def test_a_checksum_file_that_never_ends_is_refused(serve, tmp_path, capsys):
    address = serve({CHECKSUMS: (None, None)})
    assert main(["fetch", address, str(tmp_path / "back")]) == REFUSED
    assert f"has more than {MAX_CHECKSUMS_BYTES:,} bytes" in capsys.readouterr().err


def test_a_file_that_was_sent_appears_whole(artifact, tmp_path, monkeypatch):
    """A process that is killed while it sends leaves NAME.partial, with which the next one starts over."""

    def cut_off(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut_off)
        with pytest.raises(OSError, match="No space"):
            publish_artifacts(artifact, str(tmp_path / "shelf"))
    assert [path.name for path in (tmp_path / "shelf").rglob("*")] == ["config.json.partial"]
    publish_artifacts(artifact, str(tmp_path / "shelf"))
    assert files(tmp_path / "shelf") == files(artifact)


def test_a_file_is_sent_below_the_address_alone(tmp_path, victim):
    from fsspec.implementations.local import LocalFileSystem

    (tmp_path / "a").touch()
    opened = open_destination(str(tmp_path / "shelf"), LocalFileSystem(), str(tmp_path / "shelf"))
    with opened as send, pytest.raises(RefusedInput, match="not a plain path"):
        send(tmp_path / "a", "../private/keys")


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAPLANTED:PlantedKey/01@bucket/a",
        "https://PlantedKey@127.0.0.1:9/a",
        "https://127.0.0.1:9/a?sig=PlantedKey",
    ],
)
def test_an_address_with_a_key_is_refused_without_showing_the_key(address, artifact, tmp_path, capsys):
    for words in (
        ["fetch", address, str(tmp_path / "new")],
        ["publish", str(artifact), address],
        ["run", "smoke", "--out", str(tmp_path / "new"), "--data", address],
        ["run", "smoke", "--out", str(tmp_path / "new"), "--initial-model", address],
    ):
        assert main(words) == REFUSED
        said = capsys.readouterr()
        assert "key" in said.err and "PlantedKey" not in said.err + said.out
    assert not (tmp_path / "new").exists()
