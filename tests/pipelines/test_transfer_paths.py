"""Publishing and fetching: folders that share files, or hold something else, or links; odd names; full disks."""

import os
import resource
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.checksums import CHECKSUMS, write_checksums
from core.errors import RefusedInput
from core.inside import check_names
from pipelines.cli import DONE, FAILED, REFUSED, main
from pipelines.commands.fetch import fetch_artifact
from pipelines.commands.publish import publish_artifacts
from pipelines.commands.transfer import open_address

ROOT = Path(__file__).parents[2]


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = tmp_path / "run" / "artifacts" / "int4"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "weights").write_bytes(b"1234")
    write_checksums(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


SHARED = {
    "the same": ("{x}", "is SOURCE"),
    "with a slash": ("{x}/", "is SOURCE"),
    "through its parent": ("{x}/../int4", "is SOURCE"),
    "through a link": ("{link}", "is SOURCE"),
    "as an address": ("file://{x}", "is SOURCE"),
    "relative": ("artifacts/int4", "is SOURCE"),
    "relative with a dot": ("./artifacts/int4", "is SOURCE"),
    "inside": ("{x}/b", "lies inside SOURCE"),
    "inside through a link": ("{link}/b", "lies inside SOURCE"),
    "around": ("{x}/..", "contains SOURCE"),
}


@pytest.mark.parametrize("case", SHARED)
def test_two_sides_that_share_files_are_refused(case, artifact, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path / "run")
    (tmp_path / "link").symlink_to(artifact)
    address, message = SHARED[case]
    address = address.format(x=artifact, link=tmp_path / "link")
    before = files(tmp_path)
    assert main(["publish", str(artifact), address]) == REFUSED
    assert message in capsys.readouterr().err
    if "://" not in address:
        assert main(["fetch", str(artifact), address]) == REFUSED
        # A link is refused as such.
        assert message in (error := capsys.readouterr().err) or (case == "through a link" and "is a link" in error)
    assert files(tmp_path) == before


@pytest.mark.parametrize("case", ["the run", "inside the run", "its artifacts"])
def test_a_run_is_not_published_into_itself(case, artifact, tmp_path):
    run = tmp_path / "run"
    place = {"the run": run, "inside the run": run / "shelf", "its artifacts": run / "artifacts"}[case]
    with pytest.raises(RefusedInput, match="lies inside SOURCE"):
        publish_artifacts(run, str(place))
    assert publish_artifacts(run, str(tmp_path / "beside")) == [str(tmp_path / "beside" / "int4")]
    assert publish_artifacts(run, str(tmp_path)) == [str(tmp_path / "int4")], "beside the run"


def test_a_destination_with_something_else_is_refused_and_stays(artifact, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(RefusedInput, match=r"holds notes\.txt, which is no file of .*int4"):
        publish_artifacts(artifact, str(other))
    assert files(other) == {"notes.txt": b"mine"}
    (other / "notes.txt").rename(other / "config.json")
    publish_artifacts(artifact, str(other))  # the file of an artifact, as a publishing that was cut off leaves it
    assert files(other) == files(artifact)


def test_two_artifacts_do_not_share_an_address(artifact, tmp_path):
    publish_artifacts(artifact, str(tmp_path / "shelf"))
    publish_artifacts(artifact, "memory://shelf/x")
    before = files(tmp_path / "shelf")
    (artifact / "config.json").write_bytes(b'{"bf16": 1}')
    write_checksums(artifact)
    for address in (str(tmp_path / "shelf"), "memory://shelf/x"):
        with pytest.raises(RefusedInput, match="holds another artifact; name another address, or remove it there"):
            publish_artifacts(artifact, address)
    assert files(tmp_path / "shelf") == before


def test_links_of_the_source_arrive_as_files(artifact, tmp_path):
    """To a file outside, to a folder; what SHA256SUMS does not list is not sent."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big").write_bytes(b"shared")
    (artifact / "linked").symlink_to(tmp_path / "elsewhere" / "big")
    write_checksums(artifact)
    (artifact / "unlisted").symlink_to("/etc/passwd")
    (artifact / "dangling").symlink_to("nowhere")
    (artifact / "loop").symlink_to("loop")
    os.mkfifo(artifact / "pipe")
    publish_artifacts(artifact, str(tmp_path / "shelf"))
    sent = files(tmp_path / "shelf")
    assert sent.keys() == {"config.json", "sub/weights", "linked", CHECKSUMS} and sent["linked"] == b"shared"
    assert not any(path.is_symlink() for path in (tmp_path / "shelf").rglob("*"))
    fetch_artifact(str(artifact), tmp_path / "back")
    assert files(tmp_path / "back") == sent


@pytest.mark.parametrize("kind", ["dangling", "loop", "pipe", "folder"])
def test_a_listed_file_that_is_none_is_damage(kind, artifact, tmp_path, capsys):
    path = artifact / "config.json"
    path.unlink()
    {"dangling": lambda: path.symlink_to("nowhere"), "loop": lambda: path.symlink_to(path),
     "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()  # fmt: skip
    assert main(["publish", str(artifact), str(tmp_path / "shelf")]) == FAILED
    assert f"{path} is listed in SHA256SUMS but missing" in capsys.readouterr().err
    assert not (tmp_path / "shelf").exists()


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "dangling link", "pipe"])
def test_a_destination_with_links_is_refused(kind, artifact, tmp_path, capsys):
    """Writing would go through them."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "file").write_text("mine")
    for folder in (tmp_path / "shelf", tmp_path / "back.partial"):
        folder.mkdir()
        if kind == "link to a folder":
            (folder / "sub").symlink_to(tmp_path / "private")
        elif kind == "pipe":
            os.mkfifo(folder / "config.json")
        else:
            (folder / "config.json").symlink_to(tmp_path / "private" / ("file" if kind == "link to a file" else "none"))
    assert main(["publish", str(artifact), str(tmp_path / "shelf")]) == REFUSED
    assert main(["fetch", str(artifact), str(tmp_path / "back")]) == REFUSED
    assert (
        capsys.readouterr().err.count("is a named pipe; remove it" if kind == "pipe" else "is a link; remove it") == 2
    )
    assert files(tmp_path / "private") == {"file": b"mine"}


def test_a_destination_that_is_a_link_to_a_folder_is_filled(artifact, tmp_path):
    (tmp_path / "shelf").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shelf")
    publish_artifacts(artifact, str(tmp_path / "link"))
    assert files(tmp_path / "shelf") == files(artifact) and (tmp_path / "link").is_symlink()
    with pytest.raises(RefusedInput, match="is a link; name the folder it leads to"):
        fetch_artifact(str(artifact), tmp_path / "link")


TWINS = [["a.txt", "A.TXT"], ["sub/x", "SUB/x"], ["\u00e9", "e\u0301"], ["stra\u00dfe", "STRASSE"], ["a", "a/b"]]


@pytest.mark.parametrize("names", TWINS)
def test_names_that_are_one_file_elsewhere_are_refused(names, tmp_path, capsys):
    with pytest.raises(RefusedInput, match="rename one of them"):
        check_names(names, "x")
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / CHECKSUMS).write_text("".join(f"{'0' * 64}  {name}\n" for name in names), encoding="utf-8")
    assert main(["fetch", str(folder), str(tmp_path / "back")]) == REFUSED
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.partial").exists()


ODD_NAMES = ["x [v1]", "[/x]", "a b", "*", "x::y", "data:x", "~x", "line\nfeed", "#1 ?%41", "\u4e2d", "x\\y", "$HOME"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_folders_go_there_and_back(name, artifact, tmp_path, capsys, monkeypatch):
    """Relative too: fsspec reads `::`, `data:` and `~`, rich reads brackets."""
    monkeypatch.chdir(tmp_path)
    (artifact.parent / name).parent.mkdir(exist_ok=True)
    odd = artifact.rename(artifact.parent / name)
    for source, shelf, back in (
        (str(odd), str(tmp_path / "1" / name), str(tmp_path / "2" / name)),
        (str(odd), name, f"{name}-back"),
    ):
        assert main(["publish", source, shelf]) == DONE
        assert capsys.readouterr().out == f"published: {shelf}\n"
        assert main(["fetch", shelf, back]) == DONE
        assert capsys.readouterr().out == f"fetched: {back}\n"
        assert files(Path(back)) == files(odd)


@pytest.mark.parametrize("name", ["a b.txt", "#1", "what?", "50%41", "\u00e9+&", "[x]*", "x::y"])
def test_odd_files_are_fetched_over_http(name, artifact, tmp_path):
    if ":" in name:
        pytest.skip("SHA256SUMS has no colons: they are no names on Windows")
    (artifact / name).write_bytes(name.encode())
    write_checksums(artifact)
    handler = partial(SimpleHTTPRequestHandler, directory=artifact.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/int4//"
        assert files(fetch_artifact(address, tmp_path / "back")) == files(artifact)
    finally:
        server.shutdown()
        server.server_close()


ADDRESSES = {
    "http://host/x?page=1": "without a query",
    "http://host/x?token=1": "http://host/x?token=***: an address is kept",
    "https://host/x#part": "or fragment",
    "http://": "give http://HOST/FOLDER",
    "https:///x": "give https://HOST/FOLDER",
    "s3://": "give s3://BUCKET/NAME",
    "s3:///x": "no bucket|give s3",
    "s3://bucket//x": "without empty parts",
    "gs://bucket/../x": "without empty parts",
    "nowhere://x": "nowhere",
    "://x": "://x",
}


@pytest.mark.parametrize("address", [a for a in ADDRESSES if a != "s3:///x"])
def test_addresses_that_name_no_folder_are_refused(address, tmp_path, artifact, capsys):
    assert main(["fetch", address, str(tmp_path / "back")]) == REFUSED
    assert ADDRESSES[address] in capsys.readouterr().err
    assert main(["publish", str(artifact), address]) == REFUSED
    assert "Traceback" not in capsys.readouterr().err


def test_slashes_at_the_end_of_an_address_do_not_matter(tmp_path):
    for address in ("memory://shelf/x/", "memory://shelf/x//", str(tmp_path / "x"), f"{tmp_path}/x//"):
        assert open_address(address)[1].endswith("/x")


def test_a_server_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["fetch", "http://127.0.0.1:1/x", str(tmp_path / "back")]) == REFUSED
    assert "http://127.0.0.1:1/x cannot be read" in capsys.readouterr().err


def test_checksums_that_are_no_text_are_refused(artifact, tmp_path, capsys):
    (artifact / CHECKSUMS).write_bytes(b"\xff\xfe")
    assert main(["fetch", str(artifact), str(tmp_path / "back")]) == REFUSED
    assert main(["publish", str(artifact), str(tmp_path / "shelf")]) == REFUSED
    assert capsys.readouterr().err.count("is no text in UTF-8") == 2


def test_a_destination_without_room_is_refused_with_numbers(artifact, tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3, "total": usage.f_blocks})())
    with pytest.raises(RefusedInput, match=r"0\.00 GB are to be written, and the file system of .* has 0\.00 GB free"):
        publish_artifacts(artifact, str(tmp_path / "shelf"))


@pytest.mark.parametrize("command", ["publish", "fetch"])
def test_a_disk_that_runs_full_fails_and_the_same_command_continues(command, artifact, tmp_path):
    """A limit on the size of files, in a process of its own: the writing itself fails."""
    (artifact / "weights").write_bytes(bytes(1 << 20))
    write_checksums(artifact)
    words = [sys.executable, "-m", "pipelines.cli", command, str(artifact), str(tmp_path / "new")]
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=limit)
    assert done.returncode == FAILED and "Traceback" not in done.stderr
    assert "File too large" in done.stderr and "the same command continues" in done.stderr
    assert main(words[3:]) == DONE
    assert files(tmp_path / "new") == files(artifact)


def test_a_half_written_export_is_not_published(artifact, tmp_path):
    """NAME.partial has its checksums just before it is renamed."""
    artifact.rename(artifact.with_name("bf16.partial"))
    with pytest.raises(RefusedInput, match="neither an artifact"):
        publish_artifacts(tmp_path / "run", str(tmp_path / "shelf"))
