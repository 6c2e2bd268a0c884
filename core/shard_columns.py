"""`index.columns`: the entries of an MDS folder's index.json as columns that many processes can map into memory.

At the published size index.json files list 358,000 shards, and parsing them takes seconds and a gigabyte in every
process. The data step writes this file beside each index.json, which stays the truth: the file states the SHA-256 of
the index.json that it was made of, and is not used beside another one.

The file is a line of JSON, the header, filled up with blanks to a multiple of ALIGNMENT bytes; then the columns, one
after the other, each a little-endian array that begins at a multiple of ALIGNMENT bytes. The header has `format`,
`index_sha256`, `num_shards`, `is_compressed`, `vocabulary`, `kinds` (the distinct rests of the entries), `crc32` of all
that follows it, and `columns`: name -> {"offset" from the end of the header, "width" of a value in bytes}.
"""

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from core.atomic import write_bytes
from core.errors import OTHER_FORM, RefusedInput
from core.inside import check_name
from core.samples import SFT_COLUMNS, SHARD_HASH, VOCABULARY_KEY

COLUMNS_FILE = "index.columns"
FORMAT = 1
ALIGNMENT = 64
NUMBERS = {"samples": "q", "kind": "I", "raw_bytes": "q", "raw_hash": "Q", "zip_bytes": "q", "zip_hash": "Q"}
"""Column of numbers -> its type in the `struct` module. Hashes are SHARD_HASH; `kind` is a number in `kinds`."""
_USUAL_NAME = re.compile(r"[\w-]+\.\d+\.mds(\.\w+)?", re.ASCII)
NAMES = ("raw_name", "zip_name")
"""Columns of names, in UTF-8, filled up with zeros; a shard without a compressed file has an empty zip_name."""


def write_columns(index: Path, path: Path) -> None:
    """Write the columns of an index.json to `path`.

    Raises:
        RefusedInput: index.json is damaged, or describes other data than tokens.
        OSError: the disk is full; no partial file is left behind.
    """
    content = index.read_bytes()
    write_bytes(path, build_columns(content, hashlib.sha256(content).hexdigest(), str(index.parent)))


def build_columns(index: bytes, index_sha256: str, source: str) -> bytes:
    """Return the content of the file for the content of an index.json.

    Args:
        source: folder or address of the index, for messages.

    Raises:
        RefusedInput: as `write_columns`.
    """
    try:
        values, kinds, vocabulary = _parse_index(source, index)
        return _join_columns(values, kinds, vocabulary, index_sha256)
    except RefusedInput:
        raise
    except OTHER_FORM as error:
        raise RefusedInput(f"{source}/index.json is damaged ({error!r}): write the shards again") from error


def _join_columns(
    values: dict[str, list], kinds: list[dict[str, Any]], vocabulary: str | None, index_sha256: str
) -> bytes:
    body, columns = bytearray(), {}
    for name in (*NUMBERS, *NAMES):
        if name in NAMES:
            width = max([1, *map(len, values[name])])
            column = b"".join(value.ljust(width, b"\0") for value in values[name])
        else:
            width = struct.calcsize(f"<{NUMBERS[name]}")
            column = struct.pack(f"<{len(values[name])}{NUMBERS[name]}", *values[name])
        columns[name] = {"offset": len(body), "width": width}
        body += column.ljust(-(-len(column) // ALIGNMENT) * ALIGNMENT, b"\0")
    header = {
        "format": FORMAT, "index_sha256": index_sha256, "num_shards": len(values["samples"]),
        "is_compressed": any(values["zip_name"]), "vocabulary": vocabulary, "kinds": kinds, "crc32": zlib.crc32(body),
        "columns": columns,
    }  # fmt: skip
    line = json.dumps(header).encode()
    return line.ljust(-(-(len(line) + 1) // ALIGNMENT) * ALIGNMENT - 1) + b"\n" + body


def _parse_index(source: str, content: bytes) -> tuple[dict[str, list], list[dict[str, Any]], str | None]:
    """Return the columns of index.json, the distinct rests of its entries, and its vocabulary."""
    columns: dict[str, list] = {name: [] for name in (*NUMBERS, *NAMES)}
    kinds: dict[str, int] = {}

    def take_shard(value: dict[str, Any]) -> dict[str, Any] | None:
        # The parser calls this for every object as soon as it is read. So the entries never exist all at once.
        if "raw_data" not in value:
            return value
        _check_shard(source, value)
        for part in ("raw", "zip"):
            file = value.pop(f"{part}_data") or {"basename": "", "bytes": 0, "hashes": {SHARD_HASH: "0" * 16}}
            columns[f"{part}_name"].append(file["basename"].encode())
            columns[f"{part}_bytes"].append(file["bytes"])
            columns[f"{part}_hash"].append(int(file["hashes"][SHARD_HASH], 16))
        columns["samples"].append(value.pop("samples"))
        columns["kind"].append(kinds.setdefault(json.dumps(value, sort_keys=True), len(kinds)))
        return None

    index = json.loads(content, object_hook=take_shard)
    if index["version"] != 2 or any(entry is not None for entry in index["shards"]):
        raise ValueError("it is not of MDS version 2")
    vocabulary = index.get(VOCABULARY_KEY)
    if not isinstance(vocabulary, str | None):
        raise TypeError(f"{VOCABULARY_KEY} is {type(vocabulary).__name__}")
    return columns, [json.loads(kind) for kind in kinds], vocabulary


def check_shard_name(name: str, source: str) -> None:
    """Check that the name that an index gives a shard is that of a file beside it, since shards are fetched under it.

    Raises:
        RefusedInput: it is not.
    """
    if _USUAL_NAME.fullmatch(name):  # hundreds of thousands of them
        return
    check_name(name, f"{source}/index.json")
    if "/" in name:
        raise RefusedInput(f"{source}/index.json: the shard {name!r} does not lie beside it; write the shards again")


def _check_shard(source: str, shard: dict) -> None:
    if shard["samples"] < 0 or shard["raw_data"]["bytes"] < 1:
        raise RefusedInput(
            f"{source}/index.json is damaged: a shard of {shard['samples']} samples and {shard['raw_data']['bytes']} "
            "bytes; write the shards again"
        )
    for file in filter(None, (shard["raw_data"], shard["zip_data"])):
        check_shard_name(file["basename"], source)
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if "tokens" not in columns or any(SFT_COLUMNS.get(name) != encoding for name, encoding in columns.items()):
        raise RefusedInput(
            f"{source}: samples have the columns {columns}, not {SFT_COLUMNS} (loss_mask for conversations only)"
        )
    if any(SHARD_HASH not in file["hashes"] for file in (shard["raw_data"], shard["zip_data"]) if file):
        raise RefusedInput(
            f"{source}: index.json has no {SHARD_HASH} of its shards; write them with hashes=['{SHARD_HASH}']"
        )
