"""Tests of core.inside: names of others are plain names, and no link leads a write elsewhere."""

import errno
import os
import stat
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.atomic import atomic_write
from core.errors import DamagedData, RefusedInput
from core.inside import MAX_PARTS, Folder, check_name, check_names, find_problem, refuse_links

REFUSED = {
    "": "empty part", "..": "`..`", "../x": "`..`", "a/../../x": "`..`", "a/..": "`..`", ".": "`.`", "./a": "`.`",
    "a/./b": "`.`", "a//b": "empty part", "a/": "empty part", "/etc/passwd": "absolute", "//host/x": "absolute",
    "C:x": "colon", "c:/x": "colon", "a:stream": "colon", "\\\\host\\share": "backslash", "..\\x": "backslash",
    "a\0b": "control", "a\nb": "control", "a\x1b[2Jb": "control", "a\u2028b": "control", "gpj.\u202eexe": "control",
    "CON": "device", "con.txt": "device", "x/nul": "device", "COM1": "device", "lpt9.tar.gz": "device",
    "COM\u00b9": "device", "AUX .txt": "device", "a.": "dot", "a ": "blank", "a/b ./c": "dot", "...": "dot",
    "\udcff": "UTF-8", "x" * 248: "247", f"{'x' * 248}.partial": "247",
    "/".join(["abcdefg"] * 150): "parts", "/".join(["x"] * 1000): "parts",
    "/".join(["y" * 200] * 6): "1024",
}  # fmt: skip
ACCEPTED = [
    "a", ".gitattributes", "..a", "a..b", "a b", "model-00001-of-00002.safetensors", "int4/scales.safetensors",
    "CONFIG", "com", "COM10", "nullable", "x" * 247, f"{'x' * 247}.partial", "/".join(["x"] * MAX_PARTS),
    "\u4e2d/\u00e9", "#1 ?%41", "[x]*",
    "$HOME", "~x",
]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_lead_elsewhere_here_or_on_windows_are_refused(name):
    with pytest.raises(RefusedInput) as caught:
        check_name(name, "s3://bucket/SHA256SUMS, line 3")
    message = str(caught.value)
    assert message.startswith("s3://bucket/SHA256SUMS, line 3: ") and "rename it there" in message
    assert REFUSED[name] in message and message.isprintable() and len(message) < 400


@pytest.mark.parametrize("name", ACCEPTED)
def test_plain_names_are_accepted(name):
    assert find_problem(name) is None
    check_name(name, "x")


PIECES = st.sampled_from(
    ["..", ".", "/", "\\", ":", "\0", "\n", "a", "b.txt", " ", "CON", "nul", "com7", ".", "C", "é", "\udc80"]
)


@given(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=30))
@example("a/../..")
def test_any_accepted_name_stays_below_its_folder_on_every_system(name):
    """pathlib reads it for POSIX and for Windows. Names with `..` are never resolved, so none may be left."""
    if find_problem(name) is not None:
        return
    for kind, root in ((PurePosixPath, "/top"), (PureWindowsPath, "C:\\top")):
        path = kind(root) / name
        assert path.is_relative_to(root) and path != kind(root) and ".." not in path.parts
        assert len(path.relative_to(root).parts) == len(name.split("/"))
        assert str(path.relative_to(root).as_posix()) == name
    assert not PureWindowsPath(name).is_reserved()
    assert os.path.normpath(f"/top/{name}") == f"/top/{name}"
    assert name.encode() and not any(unicodedata.category(sign) == "Cc" and sign < "\x80" for sign in name)


@given(
    st.lists(st.sampled_from(["a", "A", "b", "a/b", "A/b", "a/B", "é", "e\u0301", "É", "b/c/d", "b/c", "a.partial"]))
)
def test_accepted_names_are_as_many_files_on_a_system_without_case(names):
    try:
        check_names(names, "x")
    except RefusedInput as error:
        assert "rename one of them" in str(error)
        return
    folded = {unicodedata.normalize("NFC", name.lower()) for name in names}
    assert len(folded) == len(set(names))
    assert not any(other.startswith(f"{name}/") for name in folded for other in folded)


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder of the user's beside the one that is written to; `untouched` checks it."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "keys").write_bytes(b"mine")
    (tmp_path / "out").mkdir()
    yield tmp_path / "private"
    assert {path.name: path.read_bytes() for path in (tmp_path / "private").iterdir()} == {"keys": b"mine"}


def plant(kind: str, place: Path, victim: Path) -> None:
    """Put something at a place that leads to the victim's file or folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "link":
        place.symlink_to(victim / "keys")
    elif kind == "hard link":
        place.hardlink_to(victim / "keys")
    elif kind == "dangling link":
        place.symlink_to(victim / "new")
    elif kind == "pipe":
        os.mkfifo(place)


PLANTED = ["link", "hard link", "dangling link", "pipe"]


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("name", ["file", "sub/deep/file"])
def test_nothing_is_appended_through_what_was_planted(kind, name, victim, tmp_path):
    out = tmp_path / "out"
    plant(kind, out / name, victim)
    with Folder(out) as folder, pytest.raises(RefusedInput, match="remove it and call again") as caught:
        folder.open(name, "append")
    assert str(out / name) in str(caught.value)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_new_file_replaces_what_was_planted(kind, victim, tmp_path):
    plant(kind, tmp_path / "out/sub/file", victim)
    plant(kind, tmp_path / "out/sub/file.partial", victim)
    with Folder(tmp_path / "out") as folder:
        folder.write("sub/file", b"content")
    assert (tmp_path / "out/sub/file").read_bytes() == b"content" and not (tmp_path / "out/sub/file").is_symlink()


@pytest.mark.parametrize("mode", ["append", "new", "read"])
@pytest.mark.parametrize("depth", ["sub", "a/sub"])
def test_a_folder_on_the_way_that_is_a_link_is_refused(mode, depth, victim, tmp_path):
    (tmp_path / "out" / depth).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / depth).symlink_to(victim)
    with Folder(tmp_path / "out") as folder:
        with pytest.raises(RefusedInput, match="is a link"):
            folder.open(f"{depth}/keys", mode)
        for change in (lambda: folder.write(f"{depth}/keys", b"x"), lambda: folder.remove(f"{depth}/keys")):
            with pytest.raises(RefusedInput, match="is a link"):
                change()


@pytest.mark.parametrize("name", ["../private/keys", "sub/../../private/keys", "keys\0", "a\\..\\b"])
def test_a_folder_takes_plain_names_alone(name, victim, tmp_path):
    with Folder(tmp_path / "out") as folder:
        for act in (folder.remove, folder.read, lambda name: folder.write(name, b"x")):
            with pytest.raises(RefusedInput, match="not a plain path"):
                act(name)


def test_a_folder_that_is_exchanged_while_it_is_written_gets_nothing(victim, tmp_path):
    """Neither the folder itself nor one in it; and the exchange is found."""
    out = tmp_path / "out"
    (out / "sub").mkdir()
    with Folder(out) as folder:
        folder.write("sub/first", b"1")
        folder.require_in_place()
        out.rename(tmp_path / "moved")
        out.symlink_to(victim)
        folder.write("keys", b"2")
        folder.write("sub/keys", b"2")
        folder.remove("keys")
        folder.remove_others({"sub/first"})
        with pytest.raises(DamagedData, match="put in its place while it was written"):
            folder.require_in_place()
    assert sorted(p.name for p in (tmp_path / "moved").rglob("*")) == ["first", "sub"]
    out.unlink()
    (tmp_path / "moved").rename(out)
    (out / "sub").rename(tmp_path / "away")
    (out / "sub").symlink_to(victim)
    with Folder(out) as folder, pytest.raises(RefusedInput, match="is a link"):
        folder.write("sub/keys", b"3")


def test_a_folder_that_is_a_link_is_followed_only_where_asked(victim, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(RefusedInput, match="is a link, or no folder"):
        Folder(tmp_path / "link")
    with Folder(tmp_path / "link", follow=True) as folder:
        folder.write("a", b"1")
        folder.require_in_place()
    assert (tmp_path / "out/a").read_bytes() == b"1"


def test_removing_the_others_follows_no_link(victim, tmp_path):
    out = tmp_path / "out"
    (out / "kept").mkdir()
    (out / "kept/file").touch()
    (out / "old/older").mkdir(parents=True)
    (out / "old/older/file").touch()
    (out / "to a folder").symlink_to(victim)
    (out / "to a file").symlink_to(victim / "keys")
    with Folder(out) as folder:
        folder.remove_others({"kept/file"})
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*")) == ["kept", "kept/file"]


@pytest.mark.parametrize("mode", ["a", "a+", "r+", "w", "w+"])
@pytest.mark.parametrize("kind", PLANTED)
def test_an_opener_of_files_in_place_refuses_what_was_planted(kind, mode, victim, tmp_path):
    plant(kind, tmp_path / "out/.lock", victim)
    refused = pytest.raises(RefusedInput, match=r"out/\.lock.*remove it and call again")
    with refused, open(tmp_path / "out/.lock", mode, opener=refuse_links):
        pass


def test_the_opener_opens_files_as_open_does(tmp_path):
    path = tmp_path / "file"
    for mode, expected in (("w", "new"), ("a", "newnew"), ("w", "new"), ("r+", "new")):
        with open(path, mode, opener=refuse_links) as file:
            file.write("new")
        assert path.read_text() == expected
    assert path.stat().st_mode & 0o111 == 0
    with pytest.raises(FileNotFoundError), open(tmp_path / "none", "r+", opener=refuse_links):
        pass
    with pytest.raises(IsADirectoryError), open(tmp_path, "a", opener=refuse_links):
        pass


def test_a_file_system_that_cannot_flush_a_folder_is_written_to(tmp_path, monkeypatch):
    fsync, refused = os.fsync, []

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with Folder(tmp_path) as folder:
        folder.write("sub/file", b"x")
    with atomic_write(tmp_path / "other") as partial:
        partial.write_bytes(b"y")
    assert [(tmp_path / name).read_bytes() for name in ("sub/file", "other")] == [b"x", b"y"] and len(refused) == 2


def test_files_and_folders_are_made_with_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with Folder(tmp_path) as folder:
            folder.write("sub/file", b"x")
            os.close(folder.open("sub/other", "append"))
    finally:
        os.umask(before)
    assert [(tmp_path / n).stat().st_mode & 0o777 for n in ("sub", "sub/file", "sub/other")] == [0o750, 0o640, 0o640]
