"""Publishing and fetching: local folders, fsspec's memory file system and real servers: HTTP, S3, GS, a hub."""

import functools
import hashlib
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest

from core.checksums import CHECKSUMS, parse_checksums, write_checksums
from core.errors import DamagedData, RefusedInput
from pipelines.cli import DONE, FAILED, REFUSED, main
from pipelines.commands import transfer
from pipelines.commands.fetch import fetch_artifact
from pipelines.commands.publish import publish_artifacts
from tests.pipelines import hub_server
from tests.titan_ext import object_stores

CONTENT = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 400, "int4/scales.safetensors": b"scales"}


@pytest.fixture
def run(tmp_path) -> Path:
    for artifact in ("bf16", "int4"):
        for name, content in CONTENT.items():
            path = tmp_path / "run" / "artifacts" / artifact / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(artifact.encode() + content)
        write_checksums(tmp_path / "run" / "artifacts" / artifact)
    return tmp_path / "run"


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def served(run):
    """The run's folder over HTTP; the server sends whole files only."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=run)
    handler.log_message = lambda *args: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/artifacts/int4"
    server.shutdown()
    server.server_close()


class Store(NamedTuple):
    address: str
    put: Callable[[str, bytes], None]


@pytest.fixture(params=["s3", "gs", "hf"])
def store(request, tmp_path, monkeypatch) -> Store:
    """An empty store; `put` damages a file of what is published to `address`."""
    if request.param == "hf":
        with hub_server.serve(monkeypatch) as content:
            yield Store(f"hf://{hub_server.REPOSITORY}/run", lambda name, data: content.update({f"run/{name}": data}))
        return
    (tmp_path / "nothing").mkdir()
    with object_stores.STORES[request.param](tmp_path / "nothing", monkeypatch) as found:
        yield Store(found.address, found.put)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("destination", ["{tmp_path}/shelf", "memory://shelf"])
def test_a_run_goes_there_and_an_artifact_comes_back(run, memory, tmp_path, destination):
    address = destination.format(tmp_path=tmp_path)
    assert publish_artifacts(run, address) == [f"{address}/bf16", f"{address}/int4"]
    assert files(fetch_artifact(f"{address}/int4", tmp_path / "back")) == files(run / "artifacts" / "int4")


@pytest.mark.parametrize("place", ["{run}", "{run}/", "{run}/artifacts", "{tmp_path}/shelf", "memory://shelf"])
def test_one_format_comes_from_a_run_or_from_where_it_was_published(run, memory, tmp_path, place, capsys):
    address = place.format(run=run, tmp_path=tmp_path)
    if "shelf" in place:
        publish_artifacts(run, address)
    assert main(["fetch", address, str(tmp_path / "back"), "--format", "int4"]) == DONE
    assert files(tmp_path / "back") == files(run / "artifacts" / "int4")
    assert main(["fetch", address, str(tmp_path / "other"), "--format", "gguf"]) == REFUSED
    said = " ".join(capsys.readouterr().err.split())
    assert "holds no gguf with its SHA256SUMS; there are bf16, int4" in said
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("destination", ["{tmp_path}/shelf/S", "memory://shelf/S"])
def test_a_repository_for_each_format(run, memory, tmp_path, destination):
    address = destination.format(tmp_path=tmp_path)
    assert publish_artifacts(run, address, "repositories") == [f"{address}-bf16", f"{address}-int4"]
    assert main(["fetch", address, str(tmp_path / "back"), "--format", "int4"]) == DONE
    assert files(tmp_path / "back") == files(run / "artifacts" / "int4")


def test_a_repository_that_is_not_there_is_refused_before_anything_is_sent(run, monkeypatch, capsys):
    with hub_server.serve(monkeypatch) as content:
        artifact = str(run / "artifacts/int4")
        assert main(["publish", artifact, f"hf://{hub_server.REPOSITORY}"]) == DONE
        assert "SHA256SUMS" in content
        content.clear()
        assert main(["publish", str(run), f"hf://{hub_server.REPOSITORY}", "--layout", "repositories"]) == REFUSED
        said = " ".join(capsys.readouterr().err.split())
        assert f"there is no repository {hub_server.REPOSITORY}-bf16; `hf repo create" in said
        assert not content


def test_over_http(served, run, tmp_path):
    assert files(fetch_artifact(served, tmp_path / "back")) == files(run / "artifacts" / "int4")
    root = served.removesuffix("/artifacts/int4")
    assert main(["fetch", root, str(tmp_path / "one"), "--format", "bf16"]) == DONE
    assert files(tmp_path / "one") == files(run / "artifacts" / "bf16")
    with pytest.raises(RefusedInput, match="can be fetched from but not published to"):
        publish_artifacts(run, served)


@pytest.mark.parametrize("protocol", ["ssh", "sftp"])
def test_ssh_is_refused_because_host_keys_are_not_verified(protocol, run, tmp_path, capsys):
    address = f"{protocol}://host/models"
    assert main(["publish", str(run), address]) == main(["fetch", address, str(tmp_path / "back")]) == REFUSED
    assert " ".join(capsys.readouterr().err.split()).count("sha256sum --check SHA256SUMS") == 2


def test_over_object_stores(store, run, tmp_path):
    assert publish_artifacts(run, store.address) == [f"{store.address}/bf16", f"{store.address}/int4"]
    assert files(fetch_artifact(f"{store.address}/int4", tmp_path / "back")) == files(run / "artifacts" / "int4")
    assert main(["fetch", store.address, str(tmp_path / "one"), "--format", "bf16"]) == DONE
    assert files(tmp_path / "one") == files(run / "artifacts" / "bf16")


def test_object_stores_interrupted_both_ways(store, run, tmp_path, monkeypatch):
    """The second file fails to go; the second call sends it. Of a file half fetched, the other half is asked for."""
    artifact, send = run / "artifacts" / "int4", transfer.hash_remote_file
    seen = []

    def fail_once(system, remote):
        seen.append(remote)
        if len(seen) == 2:
            raise ConnectionError("cut off")
        return send(system, remote)

    monkeypatch.setattr(transfer, "hash_remote_file", fail_once)
    with pytest.raises(ConnectionError):
        publish_artifacts(artifact, store.address)
    with pytest.raises(RefusedInput, match="has no SHA256SUMS"):
        fetch_artifact(store.address, tmp_path / "back")
    publish_artifacts(artifact, store.address)
    whole = (artifact / "model.safetensors").read_bytes()
    part = tmp_path / "back.partial" / "model.safetensors.partial"
    part.parent.mkdir()
    part.write_bytes(b"x" + whole[1:50_000])
    with pytest.raises(DamagedData, match=r"model\.safetensors has SHA-256"):
        fetch_artifact(store.address, tmp_path / "back")
    assert not part.exists(), "the first half came from elsewhere and must not be believed twice"
    part.write_bytes(whole[:50_000])
    assert files(fetch_artifact(store.address, tmp_path / "back")) == files(artifact)


def test_damage_in_an_object_store_is_refused_and_mended(store, run, tmp_path):
    artifact: Path = run / "artifacts" / "int4"
    publish_artifacts(artifact, store.address)
    store.put("model.safetensors", b"other")
    with pytest.raises(DamagedData, match=r"model\.safetensors has SHA-256"):
        fetch_artifact(store.address, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    publish_artifacts(artifact, store.address)
    assert files(fetch_artifact(store.address, tmp_path / "back")) == files(artifact)


def test_publishing_again_sends_what_is_missing_or_damaged(run, memory, monkeypatch):
    publish_artifacts(run / "artifacts" / "int4", "memory://shelf/int4")
    memory.pipe_file("/shelf/int4/model.safetensors", b"cut off")
    memory.rm_file("/shelf/int4/config.json")
    sent = []
    put_file = memory.put_file
    monkeypatch.setattr(
        memory, "put_file", lambda local, remote: sent.append(Path(local).name) or put_file(local, remote)
    )
    publish_artifacts(run / "artifacts" / "int4", "memory://shelf/int4")
    assert sent == ["config.json", "model.safetensors", CHECKSUMS]


@pytest.mark.parametrize("half", [0, 50_000, 102_404, 200_000])
def test_a_cut_off_fetch_continues(run, memory, tmp_path, monkeypatch, half):
    publish_artifacts(run / "artifacts" / "int4", "memory://shelf")
    whole = (run / "artifacts" / "int4" / "model.safetensors").read_bytes()
    partial = tmp_path / "back.partial"
    partial.mkdir()
    (partial / "model.safetensors.partial").write_bytes((whole * 2)[:half])
    asked_whole, open_file = [], memory.open

    def look(path, mode, block_size=None):
        asked_whole.extend([path.rpartition("/")[2]] if block_size == 0 else [])
        return open_file(path, mode, block_size=block_size)

    monkeypatch.setattr(memory, "open", look)
    fetch_artifact("memory://shelf", tmp_path / "back")
    assert files(tmp_path / "back") == files(run / "artifacts" / "int4")
    assert ("model.safetensors" in asked_whole) == (half not in (50_000, len(whole)))


def test_a_server_without_ranges_sends_the_whole_file_again(served, run, tmp_path):
    partial = tmp_path / "back.partial"
    partial.mkdir()
    (partial / "model.safetensors.partial").write_bytes(b"int4" + CONTENT["model.safetensors"][:1000])
    assert files(fetch_artifact(served, tmp_path / "back")) == files(run / "artifacts" / "int4")


def test_a_file_with_another_hash_is_refused_and_not_kept(run, tmp_path):
    artifact = run / "artifacts" / "int4"
    (artifact / "model.safetensors").write_bytes(b"other")
    with pytest.raises(DamagedData, match=r"model.safetensors has SHA-256 \w+, SHA256SUMS says"):
        fetch_artifact(str(artifact), tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not list((tmp_path / "back.partial").rglob("model*"))
    with pytest.raises(DamagedData, match=r"model.safetensors has SHA-256"):
        publish_artifacts(run, str(tmp_path / "shelf"))


def test_a_file_that_is_listed_but_missing(run, tmp_path):
    (run / "artifacts" / "int4" / "config.json").unlink()
    with pytest.raises(DamagedData, match=r"config.json is listed in SHA256SUMS but missing"):
        fetch_artifact(str(run / "artifacts" / "int4"), tmp_path / "back")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../evil", "a\\b", "C:evil", "./a", "a//b", CHECKSUMS, ""]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    source = tmp_path / "source"
    source.mkdir()
    (source / CHECKSUMS).write_text(f"{hashlib.sha256(b'').hexdigest()}  {name}\n")
    with pytest.raises(RefusedInput, match="line 1"):
        fetch_artifact(str(source), tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "evil").exists()


def test_a_path_listed_twice_is_refused():
    line = f"{'0' * 64}  a\n"
    with pytest.raises(RefusedInput, match="line 2"):
        parse_checksums(line * 2, "there")


def test_what_is_there_already_stays(run, tmp_path):
    artifact = run / "artifacts" / "int4"
    fetch_artifact(str(artifact), tmp_path / "back")
    assert fetch_artifact(str(artifact), tmp_path / "back") == tmp_path / "back"
    with pytest.raises(RefusedInput, match="holds something else"):
        fetch_artifact(str(run / "artifacts" / "bf16"), tmp_path / "back")


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere://a", "nowhere"), ("{tmp_path}/none", "has no SHA256SUMS"), ("memory://none", "has no SHA256SUMS")],
)
def test_addresses_that_lead_nowhere(tmp_path, source, message, capsys):
    assert main(["fetch", source.format(tmp_path=tmp_path), str(tmp_path / "back")]) == REFUSED
    assert message in capsys.readouterr().err


def test_damage_fails_with_1_and_without_a_traceback(run, tmp_path, capsys):
    artifact = run / "artifacts" / "int4"
    (artifact / "model.safetensors").write_bytes(b"other")
    assert main(["fetch", str(artifact), str(tmp_path / "back")]) == FAILED
    assert main(["publish", str(artifact), str(tmp_path / "shelf")]) == FAILED
    message = capsys.readouterr().err
    assert message.count("failed: ") == 2 and "Traceback" not in message


def test_the_commands(run, tmp_path, capsys):
    assert main(["publish", str(run), str(tmp_path / "shelf"), "--json"]) == DONE
    assert main(["fetch", str(tmp_path / "shelf" / "bf16"), str(tmp_path / "back")]) == DONE
    assert files(tmp_path / "back") == files(run / "artifacts" / "bf16")
    assert main(["publish", str(tmp_path), str(tmp_path / "shelf")]) == REFUSED
    assert "neither an artifact" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_bucket_that_is_not_there_is_refused_by_name(run, kind, tmp_path, monkeypatch, capsys):
    (tmp_path / "nothing").mkdir()
    with object_stores.STORES[kind](tmp_path / "nothing", monkeypatch):
        assert main(["publish", str(run / "artifacts" / "int4"), f"{kind}://nobodys/models"]) == REFUSED
    assert "there is no bucket 'nobodys'" in " ".join(capsys.readouterr().err.split())
