"""Files of other people: their encodings are read rightly, and a damaged one is named with the place in it."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from core.errors import DamagedData, RefusedInput
from data.catalogue.corpus import Corpus, RemoteFiles, Unit
from data.filters import decontaminate
from data.readers import file_formats, remote_files, remote_readers
from data.readers.text_decoding import decode_text, split_lines

ROWS = [{"text": f"page {number} {random.Random(number).random()}"} for number in range(3000)]
TEXTS = [row["text"] for row in ROWS]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def make_unit(address: Path | str, pattern: str = "*", columns: tuple[str, ...] = ("text",)) -> Unit:
    source = RemoteFiles(str(address), pattern, columns)
    return Unit(Corpus("c", "web", "text", "prose", "test", source, remote_readers.read_text, 1), str(address), 0, 0)


def read(address: Path | str, pattern: str = "*") -> list[str]:
    return [row["text"] for row in remote_files.read_rows(make_unit(address, pattern))]


def parquet(rows: list[dict], **options) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def arrow(rows: list[dict], new=pa.ipc.new_file) -> bytes:
    buffer = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    return buffer.getvalue()


def zipped(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, JSONL)
    return buffer.getvalue()


def locked_zip() -> bytes:
    """Return a zip whose one file is marked as encrypted."""
    content = bytearray(zipped(["a.jsonl"]))
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    return bytes(content)


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(JSONL)
        archive.addfile(info, io.BytesIO(JSONL))
    return buffer.getvalue()


def flip(content: bytes) -> bytes:
    """Return the content with some changed bytes in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 40]) + content[middle + 40 :]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


ZSTD = zstandard.compress(JSONL)
CHECKED_PARQUET = parquet(ROWS, write_page_checksum=True, row_group_size=500)
READ_RIGHTLY = {
    "plain.jsonl": JSONL,
    "lost-its-compression.jsonl.gz": JSONL,
    "gz-by-another-name.jsonl": gzip.compress(JSONL),
    "bz2-by-another-name.json": bz2.compress(JSONL),
    "xz.jsonl.xz": lzma.compress(JSONL),
    "zstd-by-another-name": ZSTD,
    "two-zstd-frames.jsonl.zst": zstandard.compress(JSONL[:5000]) + zstandard.compress(JSONL[5000:]),
    "pzstd.jsonl.zst": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + ZSTD,
    "two-gz-members.jsonl.gz": gzip.compress(JSONL[:5000]) + gzip.compress(JSONL[5000:]),
    "twice.jsonl.gz": gzip.compress(gzip.compress(JSONL)),
    "one.jsonl.zip": zipped(["a.jsonl"]),
    "parquet-by-another-name.json": parquet(ROWS),
    "checksums.parquet": CHECKED_PARQUET,
    "compressed.parquet.gz": gzip.compress(parquet(ROWS)),
    "compressed.arrow.zst": zstandard.compress(arrow(ROWS, pa.ipc.new_stream)),
    "file.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pa.ipc.new_stream),
    "crlf.jsonl": JSONL.replace(b"\n", b"\r\n"),
    "no-last-newline.jsonl": JSONL.rstrip(b"\n"),
    "blank-lines.jsonl": b"\n \r\n" + JSONL.replace(b"\n", b"\n\n"),
    "bom.jsonl": codecs.BOM_UTF8 + JSONL,
    "bom.jsonl.gz": gzip.compress(codecs.BOM_UTF8 + JSONL),
    "bom.jsonl.zst": zstandard.compress(codecs.BOM_UTF8 + JSONL),
    "joined-with-boms.jsonl": codecs.BOM_UTF8 + JSONL[: JSONL.index(b"\n") + 1] + codecs.BOM_UTF8
    + JSONL[JSONL.index(b"\n") + 1 :],
    "utf-16.jsonl": JSONL.decode().encode("utf-16"),
    "utf-16-be.jsonl": codecs.BOM_UTF16_BE + JSONL.decode().encode("utf-16-be"),
    "utf-32.jsonl.gz": gzip.compress(JSONL.decode().encode("utf-32")),
    "array.json": json.dumps(ROWS).encode(),
    "array-with-bom.json": codecs.BOM_UTF8 + json.dumps(ROWS, indent=1).encode(),
    "array-utf-16.json": json.dumps(ROWS, indent=1).encode("utf-16"),
    "array-after-blank-lines.json": b"\n\n  " + json.dumps(ROWS, indent=2).encode() + b"\n\n",
    "array-an-element-a-line.json": b"[\n" + b",\n".join(JSONL.splitlines()) + b"\n]\n",
}  # fmt: skip


@pytest.mark.parametrize("name", READ_RIGHTLY)
def test_the_content_decides_how_a_file_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(READ_RIGHTLY[name])
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x7f", "\\u000b", "\\u001c", "\\r"])
def test_only_a_line_feed_ends_a_row(tmp_path, separator):
    (tmp_path / "a.jsonl").write_bytes(f'{{"text": "a{separator}b"}}\r\n{{"text": "c"}}\n'.encode())
    assert read(tmp_path) == [json.loads(f'"a{separator}b"'), "c"]


def test_files_of_no_rows_are_no_damage(tmp_path):
    """Spark writes empty parts, and a file that says that it is done."""
    for name in ("part-0.json", "_SUCCESS"):
        (tmp_path / name).touch()
    (tmp_path / "nothing.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n")
    (tmp_path / "array.json").write_bytes(b"[]")
    (tmp_path / "a.parquet").write_bytes(parquet(ROWS[:0] or [{"text": "x"}]))
    assert read(tmp_path) == ["x"]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:66\nsize 14694\n"
PAGE = b"\n<!DOCTYPE html><html><body>404</body></html>"
DAMAGED = {
    "cut.jsonl.gz": (half(gzip.compress(JSONL)), r"after line \d,?\d+, before byte [\d,]+: EOFError"),
    "cut-at-its-beginning.jsonl.gz": (gzip.compress(JSONL)[:6], "at its beginning: EOFError"),
    "changed.jsonl.gz": (flip(gzip.compress(JSONL)), "cannot be read"),
    "checksum.jsonl.gz": (gzip.compress(JSONL)[:-8] + b"\0" * 8, "CRC check failed"),
    "cut.jsonl.bz2": (half(bz2.compress(JSONL)), "EOFError"),
    "cut.jsonl.xz": (half(lzma.compress(JSONL)), "EOFError"),
    "cut.jsonl.zst": (half(ZSTD), "EOFError: the last zstd frame is cut off"),
    "cut-second-frame.jsonl.zst": (ZSTD + half(ZSTD), "after line 3,.*EOFError: the last zstd frame is cut off"),
    "changed.jsonl.zst": (flip(zstandard.ZstdCompressor(write_checksum=True).compress(JSONL)), "ZstdError"),
    "rubbish-at-the-end.jsonl.zst": (ZSTD + b"rubbish", "ZstdError"),
    "empty.parquet": (b"", r"is empty, which no \.parquet file is"),
    "empty.arrow": (b"", r"is empty, which no \.arrow file is"),
    "empty.jsonl.gz": (b"", r"is empty, which no \.gz file is"),
    "empty.jsonl.zst": (b"", r"is empty, which no \.zst file is"),
    "no-footer.parquet": (half(parquet(ROWS)), "at its beginning: ArrowInvalid"),
    "changed.parquet": (flip(CHECKED_PARQUET), r"after row 1,\d00: OSError.*CRC"),
    "text.parquet": (JSONL, r"is no \.parquet file; it begins with b'\{"),
    "cut.arrow": (half(arrow(ROWS)), "cannot be read"),
    "cut-stream.arrow": (half(arrow(ROWS, pa.ipc.new_stream)), "after row 1,?500"),
    "unfinished-stream.arrow": (arrow(ROWS, pa.ipc.new_stream)[:-8], "is cut off after row 3,000: it has no end mark"),
    "pointer.parquet": (LFS_POINTER, "is a git-lfs pointer in place of the data; run `git lfs pull`"),
    "pointer.jsonl.gz": (LFS_POINTER, "is a git-lfs pointer"),
    "pointer.jsonl": (LFS_POINTER, "is a git-lfs pointer"),
    "page.parquet": (PAGE, "is a web page or XML"),
    "page.jsonl": (PAGE, "is a web page or XML"),
    "page.jsonl.gz": (gzip.compress(PAGE), "is a web page or XML"),
    "locked.zip": (locked_zip(), "RuntimeError.*password"),
    "two.zip": (zipped(["a.jsonl", "b.jsonl"]), "is a zip of 2 files; unpack it"),
    "archive.jsonl.gz": (gzip.compress(tarred()), "is a tar archive; unpack it"),
    "cut-array.json": (half(json.dumps(ROWS, indent=1).encode()), r"is no JSON array \(json: .*perhaps it is cut off"),
    "cut-array-of-one-line.json": (half(json.dumps(ROWS).encode()), "is no JSON array"),
    "latin-1-array.json": ('[\n{"text": "gr\xfc\xdfe"}\n]'.encode("latin-1"), "UnicodeDecodeError.*byte 0xfc"),
    "half-a-character.jsonl": (JSONL.decode().encode("utf-16")[:-1], "after line 2,999.*UnicodeDecodeError"),
    "column.parquet": (parquet([{"body": "b", "id": 1}]), "has no column 'text'; its columns are 'body', 'id'"),
    "column.arrow": (arrow([{"body": "b", "id": 1}]), "has no column 'text'; its columns are 'body', 'id'"),
    "column.jsonl": (b'{"body": "b", "id": 1}\n' * 2000, "has no column 'text'; its columns are 'body', 'id'"),
    "column.json": (b'[{"body": "b"}]', "has no column 'text'; its columns are 'body'"),
    "wrapped.json": (json.dumps({"data": ROWS}).encode(), "has no column 'text'; its columns are 'data'"),
    "over-lines.json": (b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', "are none.*6 rows .*one object a line"),
    "without-lines.json": (b'{"text": "a"}{"text": "b"}', "1 rows .json: Extra data.*one object a line"),
    "strings.json": (b'["a", "b"]', "not an object.*one object a line"),
    "tabular.jsonl": (b"text\tid\na\t1\n", "has no column 'text'; its columns are none"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_its_place(tmp_path, name):
    content, said = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedData, match=rf"(?s)1 of 1 files of c\.00000 cannot be used.*{name} .*{said}"):
        list(remote_files.read_rows(make_unit(tmp_path)))


def test_all_damaged_files_of_a_unit_are_named_at_once(tmp_path):
    damaged = [name for name in DAMAGED if name.endswith((".gz", ".parquet"))]
    for name in damaged:
        (tmp_path / name).write_bytes(DAMAGED[name][0])
    for name in ("a.jsonl", "z.jsonl"):
        (tmp_path / name).write_bytes(JSONL)
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DamagedData) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert f"{len(damaged) + 2} of {len(damaged) + 4} files" in message
    assert all(f"{tmp_path / name} " in message for name in (*damaged, "folder.parquet", "dangling.jsonl"))
    assert "a.jsonl " not in message and "z.jsonl " not in message
    assert "folder.parquet is a folder; let the pattern match the files in it" in message


def test_damage_is_not_passed_over_where_a_corpus_has_enough_documents(tmp_path):
    """A cap on the documents stops reading, but not between a damaged file and the next one."""
    (tmp_path / "a.jsonl.gz").write_bytes(DAMAGED["cut.jsonl.gz"][0])
    (tmp_path / "b.jsonl").write_bytes(JSONL)
    rows = remote_files.read_rows(make_unit(tmp_path))
    with pytest.raises(DamagedData, match=r"a\.jsonl\.gz"):
        for _ in range(len(ROWS)):
            next(rows)


def read_as_nobody(folder: Path, pattern: str, answer) -> None:
    """Put the error of reading a folder into a queue, as a user for whom permissions hold: for root they do not."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        answer.put(f"read {read(folder, pattern)}")
    except (DamagedData, RefusedInput) as error:
        answer.put(str(error))


@pytest.mark.parametrize(
    ("closed", "pattern", "said"),
    [
        ("a.jsonl", "*.jsonl", r"a\.jsonl cannot be read at its beginning: PermissionError"),
        ("sub", "**/*.jsonl", r"/sub/? may not be listed"),
        ("sub", "*/*.jsonl", r"/sub/? may not be listed"),
        (".", "*.jsonl", r"may not be listed"),
        ("sub", "*.jsonl", r"read \['a'\]"),
    ],
)
def test_what_may_not_be_read_is_named(closed, pattern, said):
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others altogether
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "sub").mkdir()
        for path in (folder / "a.jsonl", folder / "sub/b.jsonl"):
            path.write_bytes(b'{"text": "a"}\n')
        (folder / closed).chmod(0)
        process = context.Process(target=read_as_nobody, args=(folder, pattern, answer))
        process.start()
        assert re.search(said, answer.get(timeout=60))
        process.join()
        folder.chmod(0o755)
        (folder / closed).chmod(0o755)


def test_one_bad_line_or_value_costs_its_row_only(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "gr\xfc\xdfe"}\n{"text": "c"}\n')
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3))
    bad = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xfcc"))
    pyarrow.parquet.write_table(pa.table({"text": bad}), tmp_path / "b.parquet")
    dates = pa.array([0, 10**15, 1], pa.timestamp("ms"))
    pyarrow.parquet.write_table(pa.table({"text": dates}), tmp_path / "c.parquet")
    rows = list(remote_files.read_rows(make_unit(tmp_path)))
    reasons = [row.get("malformed") for row in rows]
    assert reasons == [None, "not UTF-8", None] * 2 + [None, "a value that Python cannot hold", None]
    assert [row["text"] for row in rows[:6] if "text" in row] == ["a", "c", "a", "c"]
    assert rows[1]["raw"] == '{"text": "gr\\xfc\\xdfe"}'


def test_a_column_that_a_file_may_lack_is_not_missed(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"conversations": [{"from": "human", "value": "q"}]}]))
    (tmp_path / "b.jsonl").write_bytes(b'{"conversations": []}\n')
    unit = make_unit(tmp_path, columns=("conversations", "system"))
    assert [record["messages"] for record in remote_readers.read_messages(unit)] == [
        [{"role": "user", "content": "q"}], [],
    ]  # fmt: skip
    with pytest.raises(DamagedData, match="2 of 2 files"):
        list(remote_files.read_rows(unit))


def test_a_column_may_be_rare_among_the_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n' * 999 + b'{"text": "a"}\n')
    assert sum("text" in row for row in remote_files.read_rows(make_unit(tmp_path))) == 1


def test_too_large_an_array_or_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_formats, "MAX_JSON_BYTES", 10_000)
    monkeypatch.setattr(remote_files, "MAX_JSON_BYTES", 10_000)
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS, indent=1).encode())
    (tmp_path / "b.jsonl").write_bytes(JSONL[:1000] + b"\n" + b'{"text": "' + b"x" * 20_000)
    with pytest.raises(DamagedData, match=r"(?s)2 of 2.*JSON array of more than 10,000.*a line of more than 10,000"):
        read(tmp_path)


def test_hidden_files_are_no_part_of_a_corpus(tmp_path):
    for name in ("._a.jsonl", ".cache/b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b'{"text": "%s"}\n' % name.encode())
    assert read(tmp_path, "**/*.jsonl") == ["a.jsonl", "sub/c.jsonl"]
    assert read(tmp_path, ".cache/*.jsonl") == [".cache/b.jsonl"]
    hidden = tmp_path / ".cache"
    assert read(hidden, "*.jsonl") == [".cache/b.jsonl"]


def test_linked_folders_are_read_and_a_loop_ends(tmp_path):
    (tmp_path / "disk/part").mkdir(parents=True)
    (tmp_path / "disk/part/a.jsonl").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/part").symlink_to(tmp_path / "disk/part")
    for name in ("loop", "again", "disk"):  # one folder gives 2^40 paths of two loops
        (tmp_path / "corpus" / name).symlink_to(tmp_path / "corpus")
    for pattern in ("part/*.jsonl", "**/*.jsonl", "**/part/**", "**", "part/a.jsonl", "/**/a.jsonl", "**/**/*"):
        assert read(tmp_path / "corpus", pattern) == ["a"], pattern


def test_the_folder_of_sparks_parts_is_named_or_its_parts_are_read(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    (tmp_path / "x.parquet/part-0.parquet").write_bytes(parquet(ROWS))
    assert read(tmp_path, "**/*.parquet") == read(tmp_path, "*.parquet/*.parquet") == TEXTS
    with pytest.raises(DamagedData, match=r"x\.parquet is a folder"):
        read(tmp_path, "*.parquet")


@pytest.mark.parametrize("root", ["bucket/x [v1]", "bucket/a*b", "bucket/q?", "bucket/plain"])
def test_an_address_on_a_store_is_no_pattern(root):
    fs = fsspec.filesystem("memory")
    neighbours = {f"/bucket/{name}/data/b.jsonl": b"" for name in ("x v", "aXb", "qX")}
    fs.pipe({f"/{root}/data/a.jsonl": b'{"text": "a"}\n', f"/{root}/data/.hidden.jsonl": b"", **neighbours})
    try:
        unit = make_unit(f"memory://{root}", "data/*.jsonl")
        assert [Path(path).name for path in remote_files.list_files(unit)[1]] == ["a.jsonl"]
        assert [row["text"] for row in remote_files.read_rows(unit)] == ["a"]
    finally:
        fs.rm("/bucket", recursive=True)


@pytest.mark.parametrize("address", ["nowhere://x", "s4://bucket"])
def test_an_unknown_protocol_is_refused(address):
    with pytest.raises(RefusedInput, match=rf"address {address} cannot be opened"):
        read(address)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_decoded_by_their_mark_and_split_at_line_feeds(encoding):
    text = "a\u2028b\r\nc\x0bd\n\ne"
    assert split_lines(decode_text(text.encode(encoding))) == ["a\u2028b", "c\x0bd", "", "e"]
    with pytest.raises(UnicodeDecodeError):
        decode_text(b"\xff\xfea")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_benchmark_texts_are_read_behind_a_mark_and_with_windows_line_ends(tmp_path, encoding):
    items = [
        f"a{separator}b c d e f g h i j k l m n {number}" for number, separator in enumerate(["\u2028", " ", "\x85"])
    ]
    lines = "".join(json.dumps({"benchmark": "b", "text": item}, ensure_ascii=False) + "\r\n" for item in items)
    (tmp_path / "texts.jsonl").write_bytes(lines.encode(encoding))
    counts = decontaminate.build_index(tmp_path / "texts.jsonl", 13, tmp_path / "index")
    assert (counts["b"]["items"], counts["b"]["too_short"]) == (3, 0)


def test_benchmark_texts_that_are_no_text_are_named(tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(b'{"benchmark": "b", "text": "\xfc"}\n')
    with pytest.raises(DamagedData, match=r"texts\.jsonl is no text .*byte 0xfc"):
        decontaminate.build_index(tmp_path / "texts.jsonl", 13, tmp_path / "index")
