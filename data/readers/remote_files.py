"""List, identify and read parquet, arrow, json and jsonl files under any fsspec address, row by row.

`hf://` needs the hub; to use a mirror of the same files, change `RemoteFiles.address`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from core.errors import DamagedData, RefusedInput
from core.hashing import sha256_file
from data.catalogue.corpus import Corpus, RemoteFiles, Unit
from data.readers.file_formats import (
    MAX_JSON_BYTES,
    TABLE_MAGICS,
    Place,
    describe_missing_columns,
    open_content,
    read_lines,
    read_table,
)
from data.readers.match_files import match_files
from data.readers.retries import retry, retry_rows
from data.readers.rows import dump_row, is_malformed, make_malformed, parse_json

CHECKED_ROWS = 1000
"""Number of rows of a JSON file among which each column has to occur."""
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://")
"""Beginning of an address with a protocol."""


def get_source(unit: Unit) -> RemoteFiles:
    """Return the source of a unit that is read from remote files."""
    source = unit.corpus.source
    assert isinstance(source, RemoteFiles), f"{unit.corpus.name} is no corpus of remote files"
    return source


def make_absolute(address: str) -> str:
    """Return a corpus's address so that it means the same in every working directory.

    An address with a protocol (`s3://`, `hf://`, or a chain such as `simplecache::s3://`) is fsspec's and stays as it
    is. Every other one is a folder of this machine, whatever characters it has; `~/` at its beginning is the home.
    """
    if ADDRESS.match(address) and not address.startswith("file://"):
        return address
    folder = address.removeprefix("file://")
    return os.path.abspath(Path.home() / folder[2:] if folder.startswith("~/") else folder)


def open_address(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a corpus's address, and the folder on it.

    Raises:
        RefusedInput: the protocol is not known, or the package for it is not installed.
    """
    address = make_absolute(address)
    if not ADDRESS.match(address):
        return LocalFileSystem(), address
    try:
        return fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise RefusedInput(f"corpora: the address {address} cannot be opened: {error}") from error


def list_files(unit: Unit) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """Return the file system and the unit's files on it, in sorted order.

    Raises:
        RefusedInput: no file matches the corpus's pattern, or a folder may not be listed.
    """
    fs, root = open_address(unit.location)
    if unit.files is not None:
        return fs, list(unit.files)
    return fs, match_corpus(unit.corpus, fs, root)


def match_corpus(corpus: Corpus, fs: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Return all files of a corpus, in sorted order.

    Raises:
        RefusedInput: no file matches the corpus's pattern, or a folder may not be listed.
    """
    assert isinstance(corpus.source, RemoteFiles), f"{corpus.name} is no corpus of remote files"
    pattern = corpus.source.pattern
    try:
        files = retry(partial(match_files, fs, root, pattern), f"{corpus.name}: list {root}")
    except PermissionError as error:
        raise RefusedInput(
            f"corpora: {corpus.name}: {error.filename} may not be listed; give this user the right to read it"
        ) from error
    if not files:
        address = corpus.source.address
        raise RefusedInput(f"corpora: {corpus.name} finds no {pattern!r} under {address}; check the address")
    return files


def list_inputs(unit: Unit) -> list[dict]:
    """Return `path`, `bytes` and `checksum` of each file of the unit, for the manifest.

    The checksum is the SHA-256 where the file is local or the hub states it. Otherwise it is the store's ETag or MD5,
    and None where the store states neither.
    """
    fs, files = list_files(unit)
    described = []
    for path in files:
        info = get_info(fs, path)
        local = isinstance(fs, LocalFileSystem)
        checksum = f"sha256:{sha256_file(Path(path))}" if local else find_checksum(info)
        described.append({"path": path, "bytes": info["size"], "checksum": checksum})
    return described


def get_info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
    """Return what a file system knows of a file: its size, and what it has besides."""
    return retry(partial(fs.info, path), path)


def find_checksum(info: dict[str, Any]) -> str | None:
    """Return the checksum that a store states of a file, None where it states none."""
    if info.get("lfs"):
        return f"sha256:{info['lfs']['sha256']}"
    stated = (f"{key}:{info[key]}" for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key))
    return next(stated, None)


def read_rows(unit: Unit, optional: Sequence[str] = ()) -> Iterator[dict]:
    """Yield the rows of the unit's files as dictionaries, with at least those of the corpus's columns that a file has.

    A row that cannot be read is `{"malformed": reason, "raw": text}`. When a file cannot be read, the others are still
    read through, so that one error names all such files, but no more rows are yielded: the unit has to be read again.

    Args:
        optional: columns that a file may lack.

    Raises:
        DamagedData: files cannot be read to their end, or lack a column; names each with the place in it.
    """
    fs, files = list_files(unit)
    columns = get_source(unit).columns
    required = [name for name in columns if name not in optional]
    for number, path in enumerate(files):
        try:
            yield from read_file(fs, path, columns, required)
        except DamagedData as error:
            others = (_find_damage(fs, other, columns, required) for other in files[number + 1 :])
            damage = [str(error), *filter(None, others)]
            raise DamagedData(
                f"{len(damage)} of {len(files)} files of {unit.label} cannot be used. Mend or replace them, or leave "
                "them out of the corpus's pattern, and run again:\n" + "\n".join(f"  {text}" for text in damage)
            ) from error


def _find_damage(fs: fsspec.AbstractFileSystem, path: str, columns: Sequence[str], required: Sequence[str]) -> str:
    """Read a file through; return what is wrong with it, or nothing."""
    try:
        for _ in read_file(fs, path, columns, required):
            pass
    except DamagedData as error:
        return str(error)
    return ""


def read_file(
    fs: fsspec.AbstractFileSystem, path: str, columns: Sequence[str], required: Sequence[str]
) -> Iterator[dict]:
    """Yield the rows of one file. What a store refuses for a moment is tried again.

    Raises:
        DamagedData: the file cannot be read to its end, or lacks a required column; names the file and the place.
    """
    place = Place()

    def read_once() -> Iterator[dict]:
        nonlocal place
        place = Place()
        with fs.open(path) as raw:
            file, beginning = open_content(raw, path)
            if beginning.startswith(TABLE_MAGICS):
                yield from read_table(file, beginning, columns, required, place)
            else:
                rows = _check_columns(_read_json_rows(read_lines(file, beginning, raw, place)), required)
                # Another column may have any name, `malformed` too.
                yield from (row if is_malformed(row) else _select(row, columns) for row in rows)

    try:
        yield from retry_rows(read_once, path)
    except DamagedData as error:
        raise DamagedData(f"{path} {error}") from error
    except IsADirectoryError as error:
        raise DamagedData(f"{path} is a folder; let the pattern match the files in it") from error
    # File systems, decompressors and parsers raise errors of their own, few of which name a file.
    except Exception as error:
        raise DamagedData(f"{path} cannot be read {place}: {type(error).__name__}: {error}") from error


def _select(row: dict, columns: Sequence[str]) -> dict:
    return {name: row[name] for name in columns if name in row}


def _check_columns(rows: Iterator[dict], required: Sequence[str]) -> Iterator[dict]:
    """Yield the rows of a JSON file, once every required column was in one of the first CHECKED_ROWS.

    Raises:
        DamagedData: a column was in none of them. This is so for JSON in a form that is not read, too: an object over
            several lines, objects without a line between them.
    """
    first = list(islice(rows, CHECKED_ROWS))
    names = list(dict.fromkeys(name for row in first if not is_malformed(row) for name in row))
    missing = [name for name in required if name not in names]
    if first and missing:
        problem = f" ({first[0]['malformed']})" if is_malformed(first[0]) else ""
        raise DamagedData(
            f"{describe_missing_columns(missing, names)}. Looked at: {len(first):,} rows{problem}. JSON is read as one "
            "object a line, or as one array of objects"
        )
    yield from first
    yield from rows


def _read_json_rows(lines: Iterator[bytes]) -> Iterator[dict]:
    """Yield the rows of one JSON array, which is held in memory, or of one row a line.

    Raises:
        DamagedData: an array does not parse or is too large.
    """
    first, second = next(lines, None), next(lines, None)
    if first is None:
        return
    rows: Any = _parse_line(first)
    if first.startswith(b"[") and (second is None or not isinstance(rows, list)):
        if second is not None:
            rows = _parse_array(chain([first, second], lines))
        elif not isinstance(rows, list):
            raise DamagedData(f"is no JSON array ({rows['malformed']}): perhaps it is cut off")
        yield from (row if isinstance(row, dict) else _reject(row) for row in rows)
        return
    for line in chain([first, second] if second is not None else [first], lines):
        row = _parse_line(line)
        yield row if isinstance(row, dict) else _reject(row)


def _reject(row: object) -> dict:
    return make_malformed("json: not an object", dump_row(row))


def _parse_array(lines: Iterator[bytes]) -> list:
    """Return the elements of an array over many lines. A blank line cannot be a part of a string in JSON."""
    content = bytearray()
    for line in lines:
        content += line + b"\n"
        if len(content) > MAX_JSON_BYTES:
            raise DamagedData(
                f"is a JSON array of more than {MAX_JSON_BYTES:,} bytes, which is parsed whole; write one row a line"
            )
    array: Any = parse_json(content.decode())
    if not isinstance(array, list):
        raise DamagedData(f"is no JSON array ({array['malformed']}): perhaps it is cut off")
    return array


def _parse_line(line: bytes) -> object:
    try:
        return parse_json(line.decode())
    except UnicodeDecodeError:
        return make_malformed("not UTF-8", line.decode(errors="backslashreplace"))
