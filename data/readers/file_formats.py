"""Tell what a file holds by its first bytes, and read parquet and Arrow rows and the lines of a text.

Names lie: web clients unpack a `.gz` in passing, a server answers with an error page, git-lfs leaves a pointer. So the
content decides, and a name only says what an empty or unknown file was meant to be.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet

from core.errors import DamagedData
from data.readers.arrow_rows import read_batch
from data.readers.text_decoding import detect_encoding
from data.readers.zstd_frames import ZSTD_MAGICS, ZstdFrames

ROWS_PER_BATCH = 1024
MAX_JSON_BYTES = 4 << 30
"""Largest line, and largest array, of a JSON file in bytes: both are parsed in memory."""

MAX_COMPRESSIONS = 4
"""Largest number of compressions around one content."""
MAX_RATIO, FREE_BYTES = 1_000, 256 << 20
"""Largest ratio of content to stored file, once the content has FREE_BYTES."""

PEEKED_BYTES = 512
PARQUET_MAGIC, ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
TABLE_MAGICS = (PARQUET_MAGIC, ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC)
"""First bytes of the formats that hold tables with a schema."""
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"PK\x03\x04": lambda file: _open_zip(file),
    **dict.fromkeys(ZSTD_MAGICS, ZstdFrames),
}
"""First bytes of a compressed file -> function that opens its content."""
BINARY_SUFFIXES = (".parquet", ".arrow", ".gz", ".bz2", ".xz", ".zst", ".zip")
"""Suffixes of formats that begin with bytes of their own. Even an empty table or text has them."""
STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer in place of the data; run `git lfs pull` where it was cloned"),
    (b"<", "is a web page or XML in place of the data, perhaps an error or a login; download it again"),
    (b"FEA1", "is an old Feather file; write it as parquet"),
)
"""Pairs of the first bytes of a file that holds no data, and what it is."""


@dataclass
class Place:
    """How far a file was read, for messages.

    Attributes:
        count: number of `unit`s that were read.
        byte: position in the stored file where reading a text failed. Reading is ahead of parsing by a buffer, so it is
            a bound.
    """

    unit: str = "line"
    count: int = 0
    byte: int | None = None

    def __str__(self) -> str:
        if not self.count:
            return "at its beginning"
        return f"after {self.unit} {self.count:,}" + (f", before byte {self.byte:,}" if self.byte else "")


def open_content(raw: BinaryIO, path: str) -> tuple[io.BufferedReader, bytes]:
    """Return the content of a file behind all its compressions, and its first PEEKED_BYTES.

    A compressed table is unpacked in memory.

    Raises:
        DamagedData: the file is empty, or holds something else than its name says.
    """
    file: io.BufferedReader = io.BufferedReader(cast(Any, raw))
    beginning = _peek(file)
    compressed = 0
    while opener := next((COMPRESSIONS[magic] for magic in COMPRESSIONS if beginning.startswith(magic)), None):
        if compressed == MAX_COMPRESSIONS:
            raise DamagedData(f"is compressed more than {MAX_COMPRESSIONS} times over; unpack it")
        file = io.BufferedReader(cast(Any, BoundedContent(opener(file), raw)))
        beginning = _peek(file)
        compressed += 1
    suffix = PurePosixPath(path).suffix
    for magic, description in STRANGERS:
        if beginning.lstrip().startswith(magic):
            raise DamagedData(description)
    if beginning[257:262] == b"ustar":
        raise DamagedData("is a tar archive; unpack it")
    if not beginning and not compressed and suffix in BINARY_SUFFIXES:
        raise DamagedData(f"is empty, which no {suffix} file is")
    columnar = beginning.startswith(TABLE_MAGICS)
    # A text may have lost its compression on the way, but not a table its format.
    text = suffix not in (".parquet", ".arrow") and beginning.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1] in (b"{", b"[")
    if suffix in BINARY_SUFFIXES and not (columnar or compressed or text):
        raise DamagedData(f"is no {suffix} file; it begins with {beginning[:16]!r}")
    if compressed and columnar:
        # A table is not read from its beginning to its end, as a compressed file is.
        file = io.BufferedReader(cast(Any, io.BytesIO(file.read())))
    return file, beginning


class BoundedContent(io.RawIOBase):
    """The content of a compressed file, which ends in a refusal where a small file unpacks to an immense one."""

    def __init__(self, content: Any, stored: BinaryIO):
        self._content, self._stored, self._bytes = content, stored, 0

    def readable(self) -> bool:
        """Return True: the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes; return their number, 0 at the end.

        Raises:
            DamagedData: the content is FREE_BYTES and MAX_RATIO times what was read of the stored file.
        """
        size = self._content.readinto(buffer)
        self._bytes += size
        if self._bytes > FREE_BYTES and self._bytes > MAX_RATIO * self._stored.tell():
            raise DamagedData(
                f"unpacks to more than {MAX_RATIO} times its size, as no text does; leave it out, or unpack it if it "
                "is what you want"
            )
        return size

    def seekable(self) -> bool:
        """Return whether the content can be read from another position, as a zip is."""
        return self._content.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another position and return it."""
        return self._content.seek(offset, whence)


def _peek(file: io.BufferedReader) -> bytes:
    return file.peek(PEEKED_BYTES)[:PEEKED_BYTES]


def _open_zip(file: Any) -> Any:
    archive = zipfile.ZipFile(file)
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if len(names) != 1:
        raise DamagedData(f"is a zip of {len(names)} files; unpack it")
    return archive.open(names[0])


def read_table(
    file: io.BufferedReader, beginning: bytes, columns: Sequence[str], required: Sequence[str], place: Place
) -> Iterator[dict]:
    """Yield the rows of a parquet or Arrow file; a row with a value that Python cannot hold is malformed.

    Args:
        columns: the columns to read, where the file has them.
        required: those that it must have.

    Raises:
        DamagedData: a required column is missing, or the file ends too early.
    """
    if beginning.startswith(PARQUET_MAGIC):
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        names = table.schema_arrow.names
        groups = table.num_row_groups
        batches: Iterator[pa.RecordBatch] = (
            batch
            for group in range(groups)
            for batch in table.iter_batches(ROWS_PER_BATCH, [group], [name for name in columns if name in names])
        )
    else:
        reader = pa.ipc.open_file(file) if beginning.startswith(ARROW_FILE_MAGIC) else pa.ipc.open_stream(file)
        names = reader.schema.names
        batches = _read_arrow_batches(reader, [name for name in columns if name in names])
    if missing := [name for name in required if name not in names]:
        raise DamagedData(describe_missing_columns(missing, names))
    place.unit = "row"
    for batch in batches:
        yield from read_batch(batch)
        place.count += batch.num_rows
    if beginning.startswith(ARROW_STREAM_MAGIC):
        file.seek(-len(ARROW_STREAM_END), io.SEEK_END)
        if file.read() != ARROW_STREAM_END:
            raise DamagedData(f"is cut off {place}: it has no end mark, so its writer did not finish")


def _read_arrow_batches(reader: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(index).select(columns) for index in range(reader.num_record_batches))
    else:
        yield from (batch.select(columns) for batch in reader)


def describe_missing_columns(missing: Sequence[str], names: Sequence[str]) -> str:
    """Return what to say of a file that lacks columns."""
    return (
        f"has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, names)) or 'none'}. "
        "Correct the columns of the corpus, or the pattern that matches the file"
    )


def read_lines(file: io.BufferedReader, beginning: bytes, raw: BinaryIO, place: Place) -> Iterator[bytes]:
    r"""Yield the lines of a text that are not blank, as UTF-8 without byte order marks.

    Only `\n` ends a line. A text in UTF-16 or UTF-32 is known by its byte order mark. The bytes of a text in UTF-8 are
    not looked at: some line may be in another encoding. Joined files have marks in the middle.

    Args:
        raw: the file as it is stored, where `file` is its content.

    Raises:
        DamagedData: a line is longer than MAX_JSON_BYTES.
        UnicodeDecodeError: the text is not in the UTF-16 or UTF-32 that its mark announces.
    """
    encoding = detect_encoding(beginning)
    if encoding == "utf-8":
        lines: Iterator[bytes] = iter(lambda: file.readline(MAX_JSON_BYTES), b"")
    else:
        text = io.TextIOWrapper(file, encoding, newline="\n")
        lines = (line.encode("utf-8", "surrogatepass") for line in iter(lambda: text.readline(MAX_JSON_BYTES), ""))
    try:
        for line in lines:
            if len(line) >= MAX_JSON_BYTES:
                raise DamagedData(f"has a line of more than {MAX_JSON_BYTES:,} bytes {place}; write one row a line")
            if stripped := line.removeprefix(codecs.BOM_UTF8).strip():
                yield stripped
            place.count += 1
    except Exception:
        place.byte = raw.tell()
        raise
