"""Readers of files on any fsspec address: parquet, arrow, json and jsonl, as data set hubs and mirrors serve them.

A reader takes the columns its corpus names, in that order. `hf://` needs the hub; a mirror is the same files under
another address (`RemoteFiles.address`).
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain

import fsspec
import pyarrow as pa
import pyarrow.parquet

from core.errors import RefusedInput
from data.catalogue.corpus import Unit
from data.readers.instruction_readers import exchange, turn

ROWS_PER_BATCH = 1024
ARROW_FILE_MAGIC = b"ARROW1"
ROLES_OF_SPEAKERS = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names of the speakers; a role that has its usual name already is left as it is."""
TOOLS_PROMPT = "You may call these functions:"


def files_of(unit: Unit) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """The file system and this unit's files on it: every `shards`-th, in sorted order.

    Raises:
        RefusedInput: no file matches the corpus's pattern.
    """
    source = unit.corpus.source
    fs, root = fsspec.core.url_to_fs(unit.location)
    files = sorted(fs.glob(f"{root.rstrip('/')}/{source.pattern}"))
    if not files:
        raise RefusedInput(
            f"corpora: {unit.corpus.name} finds no {source.pattern!r} under {unit.location}; check the address"
        )
    return fs, files[unit.shard :: unit.corpus.shards]


def inputs(unit: Unit) -> list[dict]:
    """What this unit read, for the manifest: `path`, `bytes` and a `checksum`.

    The checksum is sha256 where the file is local or the hub keeps one, otherwise the store's own ETag or MD5, and None
    where the store states nothing.
    """
    fs, files = files_of(unit)
    return [_identity(fs, path) for path in files]


def _identity(fs: fsspec.AbstractFileSystem, path: str) -> dict:
    info = fs.info(path)
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        with open(path, "rb") as file:
            checksum = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    elif info.get("lfs"):
        checksum = f"sha256:{info['lfs']['sha256']}"
    else:
        stated = (f"{key}:{info[key]}" for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key))
        checksum = next(stated, None)
    return {"path": path, "bytes": info["size"], "checksum": checksum}


def rows(unit: Unit) -> Iterator[dict]:
    """Rows of this unit's files as dictionaries with at least the corpus's columns that the file has.

    A jsonl line that does not parse is `{"malformed", "raw"}`.
    """
    fs, files = files_of(unit)
    columns = unit.corpus.source.columns
    for path in files:
        if path.endswith(".parquet"):
            with fs.open(path) as file:
                yield from _parquet_rows(file, columns)
        elif path.endswith(".arrow"):
            with fs.open(path) as file:
                for batch in _arrow_batches(file):
                    yield from batch.select([name for name in columns if name in batch.schema.names]).to_pylist()
        else:
            with fs.open(path, compression="infer") as file:
                yield from _json_rows(io.TextIOWrapper(file, encoding="utf-8", errors="replace"))


def _parquet_rows(file: io.IOBase, columns: tuple[str, ...]) -> Iterator[dict]:
    table = pyarrow.parquet.ParquetFile(file)
    present = [name for name in columns if name in table.schema_arrow.names]
    for batch in table.iter_batches(ROWS_PER_BATCH, columns=present):
        yield from batch.to_pylist()


def _arrow_batches(file: io.IOBase) -> Iterable[pa.RecordBatch]:
    """Batches of Arrow's file format, or of its stream format, which `datasets` writes under the same suffix."""
    magic = file.read(len(ARROW_FILE_MAGIC))
    file.seek(0)
    if magic == ARROW_FILE_MAGIC:
        reader = pa.ipc.open_file(file)
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return pa.ipc.open_stream(file)


def _json_rows(file: io.TextIOWrapper) -> Iterator[dict]:
    """One array of rows, or a row a line."""
    first = file.readline()
    if first.lstrip().startswith("["):
        array = _parsed(first + file.read())
        yield from array if isinstance(array, list) else [array]
        return
    for line in chain([first], file):
        if line.strip():
            row = _parsed(line)
            yield row if isinstance(row, dict) else {"malformed": "json: not an object", "raw": line}


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return {"malformed": f"json: {error.msg}", "raw": text}


def read_text(unit: Unit) -> Iterator[dict]:
    """Documents. Columns: the text."""
    (text,) = unit.corpus.source.columns
    for row in rows(unit):
        yield row if "malformed" in row else {"text": row.get(text)}


def read_pairs(unit: Unit) -> Iterator[dict]:
    """One question and one answer. Columns: question, answer."""
    question, answer = unit.corpus.source.columns
    for row in rows(unit):
        yield row if "malformed" in row else exchange(row.get(question), row.get(answer))


def read_unharmful_pairs(unit: Unit) -> Iterator[dict]:
    """Pairs whose answer was labelled unharmful; the others are set aside. Columns: question, answer, label."""
    question, answer, label = unit.corpus.source.columns
    for row in rows(unit):
        if "malformed" in row:
            yield row
        elif row.get(label) != "unharmful":
            yield {"malformed": f"{label} is {row.get(label)!r}, not 'unharmful'", "raw": json.dumps(row)}
        else:
            yield exchange(row.get(question), row.get(answer))


def read_messages(unit: Unit) -> Iterator[dict]:
    """Conversations. Columns: messages ({role, content, tool_calls} or {from, value}); a system prompt, if any."""
    messages, *system = unit.corpus.source.columns
    for row in rows(unit):
        if "malformed" in row or not isinstance(row.get(messages), list):
            yield row if "malformed" in row else {"malformed": f"no list in `{messages}`", "raw": json.dumps(row)}
            continue
        before = [turn("system", row[name]) for name in system if row.get(name)]
        yield {"messages": [*before, *map(_message, row[messages])]}


def read_prompted(unit: Unit) -> Iterator[dict]:
    """The messages so far and the assistant's next. Columns: messages, answer."""
    messages, answer = unit.corpus.source.columns
    for row in rows(unit):
        if "malformed" in row or not isinstance(row.get(messages), list):
            yield row if "malformed" in row else {"malformed": f"no list in `{messages}`", "raw": json.dumps(row)}
        else:
            yield {"messages": [*map(_message, row[messages]), turn("assistant", row.get(answer))]}


def read_function_calls(unit: Unit) -> Iterator[dict]:
    """One request answered by calls. Columns: request, tools, calls; the last two are JSON in a string."""
    request, tools, calls = unit.corpus.source.columns
    for row in rows(unit):
        if "malformed" in row:
            yield row
            continue
        conversation = exchange(row.get(request), row.get(calls))["messages"]
        yield {"messages": [turn("system", f"{TOOLS_PROMPT}\n{row.get(tools)}"), *conversation]}


def _message(said: dict) -> dict:
    """A message in {role, content}; the functions that a turn calls follow its words as JSON."""
    role = said.get("role") or said.get("from")
    content = said.get("content") if "content" in said else said.get("value")
    if said.get("tool_calls"):
        calls = json.dumps([call["function"] for call in said["tool_calls"]])
        content = f"{content}\n{calls}" if content else calls
    return turn(ROLES_OF_SPEAKERS.get(role, role), content)
