"""Archives and compressed files that are small and unpack to an immense content end in a refusal, and write nothing."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem

from core.errors import DamagedData, RefusedInput
from data.readers import file_formats, package_readers
from data.readers.remote_files import read_file

ZEROS = bytes(1 << 20)


def write_archive(path: Path, members: list[tuple[str, bytes]]) -> str:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            for name, content in members:
                wheel.writestr(name, content)
        return str(path)
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in members:
            info = tarfile.TarInfo(f"top/{name}")
            info.size = len(content)
            sdist.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_an_archive_that_unpacks_to_too_much_is_refused(suffix, tmp_path, monkeypatch):
    """The content lies in one member, in many that are wanted together, or, in a tar, before the one that is wanted."""
    monkeypatch.setattr(package_readers, "MAX_ARCHIVE_BYTES", 3 << 20)
    bombs = {"one": [("a/b", ZEROS * 4)], "many": [(f"a/{i}", ZEROS) for i in range(4)]}
    if suffix == ".tar.gz":
        bombs["before"] = [("0", ZEROS * 4), ("a/b", b"x")]
    for name, members in bombs.items():
        archive = write_archive(tmp_path / f"{name}{suffix}", members)
        with pytest.raises(DamagedData, match=r"unpacks to more than 3,145,728 bytes.*fetch the package") as caught:
            package_readers.read_archive_members(archive, "a/")
        assert archive in str(caught.value)
    archive = write_archive(tmp_path / f"whole{suffix}", [("a/b", ZEROS), ("a/c", ZEROS)])
    assert package_readers.read_archive_members(archive, "a/") == {"a/b": ZEROS, "a/c": ZEROS}


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_an_archive_whose_header_states_a_small_size_is_read_by_its_content(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(package_readers, "MAX_ARCHIVE_BYTES", 1 << 20)
    archive = Path(write_archive(tmp_path / f"a{suffix}", [("a/b", ZEROS * 2)]))
    if suffix == ".whl":
        size = (2 << 20).to_bytes(4, "little")
        assert archive.read_bytes().count(size) == 2
        archive.write_bytes(archive.read_bytes().replace(size, (5).to_bytes(4, "little")))
    with pytest.raises(DamagedData):
        package_readers.read_archive_members(str(archive), "a/")


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
def test_an_archive_of_very_many_members_is_refused(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(package_readers, "MAX_ARCHIVE_MEMBERS", 1000)
    archive = write_archive(tmp_path / f"a{suffix}", [(f"a/{i}", b"") for i in range(1001)])
    with pytest.raises(DamagedData, match="more than 1,000 members"):
        package_readers.read_archive_members(archive, "a/")


@pytest.mark.parametrize("suffix", [".whl", ".tar.gz"])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "/".join(["a"] * 1000) + "/evil"])
def test_members_are_never_written_under_their_names(suffix, name, tmp_path, monkeypatch):
    """An archive's members stay in memory; a thousand nested folders are one name."""
    monkeypatch.chdir(tmp_path)
    archive = write_archive(tmp_path / f"x{suffix}", [(name, b"evil"), ("wanted", b"text")])
    before = sorted(os.walk(tmp_path))
    assert package_readers.read_archive_members(archive, "wanted") == {"wanted": b"text"}
    assert sorted(os.walk(tmp_path)) == before


def read(path: Path) -> list[dict]:
    return list(read_file(LocalFileSystem(), str(path), ["text"], ["text"]))


ROW = json.dumps({"text": "a" * 1000}).encode() + b"\n"
COMPRESS = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress,
}  # fmt: skip


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused(suffix, tmp_path, monkeypatch):
    content = ROW * 20_000
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](content))
    assert len(read(tmp_path / f"a.jsonl{suffix}")) == 20_000, "a small one may be as repetitive as it likes"
    monkeypatch.setattr(file_formats, "FREE_BYTES", 1 << 20)
    (tmp_path / f"b.jsonl{suffix}").write_bytes(COMPRESS[suffix](COMPRESS[suffix](content)))
    with pytest.raises(DamagedData, match=r"b\.jsonl.*unpacks to more than 1000 times its size"):
        read(tmp_path / f"b.jsonl{suffix}")


def test_a_file_that_is_compressed_many_times_over_is_refused(tmp_path):
    content = ROW
    for count in range(1, 200):
        content = gzip.compress(content)
        if count <= file_formats.MAX_COMPRESSIONS:
            (tmp_path / "a.jsonl.gz").write_bytes(content)
            assert len(read(tmp_path / "a.jsonl.gz")) == 1
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DamagedData, match="is compressed more than 4 times over; unpack it"):
        read(tmp_path / "a.jsonl.gz")


def test_a_zip_within_a_gzip_is_still_read(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("a.jsonl", ROW)
    (tmp_path / "a.zip.gz").write_bytes(gzip.compress(inner.getvalue()))
    assert len(read(tmp_path / "a.zip.gz")) == 1


def test_a_package_without_the_member_is_refused_as_before(tmp_path):
    archive = write_archive(tmp_path / "a.whl", [("a", b"")])
    with pytest.raises(RefusedInput, match="holds no 'b'"):
        package_readers.read_archive_members(archive, "b")
