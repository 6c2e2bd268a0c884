"""List, identify and read parquet, arrow, json and jsonl files under any fsspec address, row by row.

`hf://` needs the hub; to use a mirror of the same files, change `RemoteFiles.address`.
"""

import io
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet

from core.errors import RefusedInput
from core.hashing import sha256_file
from data.catalogue.corpus import RemoteFiles, Unit
from data.readers.arrow_rows import read_batch
from data.readers.rows import MALFORMED_FIELDS, parse_json

ROWS_PER_BATCH = 1024
ARROW_FILE_MAGIC = b"ARROW1"
"""First bytes of Arrow's file format; its stream format has none."""


def get_source(unit: Unit) -> RemoteFiles:
    """Return the source of a unit that is read from remote files."""
    source = unit.corpus.source
    assert isinstance(source, RemoteFiles), f"{unit.corpus.name} is no corpus of remote files"
    return source


def list_files(unit: Unit) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """Return the file system and the unit's files on it: every `shards`-th file of the corpus in sorted order.

    Raises:
        RefusedInput: no file matches the corpus's pattern.
    """
    source = get_source(unit)
    fs, root = fsspec.core.url_to_fs(unit.location)
    files = sorted(fs.glob(f"{root.rstrip('/')}/{source.pattern}"))
    if not files:
        raise RefusedInput(
            f"corpora: {unit.corpus.name} finds no {source.pattern!r} under {unit.location}; check the address"
        )
    return fs, files[unit.shard :: unit.corpus.shards]


def list_inputs(unit: Unit) -> list[dict]:
    """Return `path`, `bytes` and `checksum` of each file of the unit, for the manifest.

    The checksum is the SHA-256 where the file is local or the hub states it. Otherwise it is the store's ETag or MD5,
    and None where the store states neither.
    """
    fs, files = list_files(unit)
    return [_describe_file(fs, path) for path in files]


def _describe_file(fs: fsspec.AbstractFileSystem, path: str) -> dict:
    info = fs.info(path)
    checksum: str | None
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        checksum = f"sha256:{sha256_file(Path(path))}"
    elif info.get("lfs"):
        checksum = f"sha256:{info['lfs']['sha256']}"
    else:
        stated = (f"{key}:{info[key]}" for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key))
        checksum = next(stated, None)
    return {"path": path, "bytes": info["size"], "checksum": checksum}


def read_rows(unit: Unit) -> Iterator[dict]:
    """Yield the rows of the unit's files as dictionaries, with at least those of the corpus's columns that a file has.

    A jsonl line that does not parse is `{"malformed": reason, "raw": line}`.
    """
    fs, files = list_files(unit)
    columns = get_source(unit).columns
    for path in files:
        if path.endswith(".parquet"):
            with fs.open(path) as file:
                yield from _read_parquet_rows(file, columns)
        elif path.endswith(".arrow"):
            with fs.open(path) as file:
                for batch in _read_arrow_batches(file):
                    yield from read_batch(batch.select([name for name in columns if name in batch.schema.names]))
        else:
            with fs.open(path, compression="infer") as file:
                yield from _read_json_rows(io.TextIOWrapper(file, encoding="utf-8", errors="replace"), columns)


def _read_parquet_rows(file: io.IOBase, columns: tuple[str, ...]) -> Iterator[dict]:
    table = pyarrow.parquet.ParquetFile(file)
    present = [name for name in columns if name in table.schema_arrow.names]
    for batch in table.iter_batches(ROWS_PER_BATCH, columns=present):
        yield from read_batch(batch)


def _read_arrow_batches(file: io.IOBase) -> Iterable[pa.RecordBatch]:
    """Return the batches of Arrow's file format, or of its stream format; `datasets` writes both with one suffix."""
    magic = file.read(len(ARROW_FILE_MAGIC))
    file.seek(0)
    if magic == ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return pa.ipc.open_stream(file)


def _read_json_rows(file: io.TextIOWrapper, columns: tuple[str, ...]) -> Iterator[Any]:
    """Yield the rows of one JSON array, or of one row a line, with the corpus's columns alone.

    Another column may have any name, `malformed` too.
    """
    first = file.readline()
    if first.lstrip().startswith("["):
        array: Any = parse_json(first + file.read())
        rows = iter(array if isinstance(array, list) else [array])
    else:
        rows = (parse_json(line) for line in chain([first], file) if line.strip())
    for row in rows:
        if isinstance(row, dict) and row.keys() != MALFORMED_FIELDS:
            row = {name: row[name] for name in columns if name in row}
        yield row
