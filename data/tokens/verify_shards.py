"""Verification of a finished data folder, or of a copy of one, by the hashes in its manifest."""

import json
from collections.abc import Iterator
from pathlib import Path

from core.errors import DamagedData, RefusedInput
from core.hashing import sha256_file
from core.samples import SHARDS_AT
from core.shard_columns import COLUMNS_FILE

MANIFEST = "data_manifest.json"
PAGE = "statistics.html"
"""The statistics page, which no hash covers."""


def verify_shards(folder: Path) -> dict[str, int]:
    """Hash every index and every shard of a data folder.

    The manifest holds the SHA-256 of each index.json, which holds the SHA-256 of its shards. So the one file vouches
    for all others.

    Returns:
        numbers of `domains`, `shards` and `bytes` that were verified.

    Raises:
        RefusedInput: the folder has no manifest, or shards of another folder.
        DamagedData: a file is missing, changed or not in its index; names it and the way out.
    """
    recorded = folder / MANIFEST
    if not recorded.is_file():
        raise RefusedInput(f"{recorded} is missing: the folder is not a finished data step; run the data step again")
    manifest = json.loads(recorded.read_text())
    totals = {"domains": 0, "shards": 0, "bytes": 0}
    for target, entry in list_destinations(manifest):
        index = folder / target / "index.json"
        _check_hash(index, entry["index_sha256"])
        files = [shard["zip_data"] or shard["raw_data"] for shard in json.loads(index.read_text())["shards"]]
        if index.with_name(SHARDS_AT).exists():
            raise RefusedInput(
                f"{index.parent} holds the index alone; verify the data set that {index.with_name(SHARDS_AT)} names"
            )
        for file in files:
            _check_hash(index.with_name(file["basename"]), file["hashes"]["sha256"])
        known = {file["basename"] for file in files} | {"index.json", COLUMNS_FILE}
        unknown = {path.name for path in index.parent.iterdir()} - known
        if unknown:
            raise DamagedData(f"{index.parent}: {sorted(unknown)} are not in index.json; remove them")
        totals["domains"] += 1
        totals["shards"] += len(files)
        totals["bytes"] += sum(file["bytes"] for file in files)
    return totals


def list_destinations(manifest: dict) -> Iterator[tuple[str, dict]]:
    """Yield the path of every MDS folder below the data folder, such as `shards/pretrain/web`, and its entry."""
    for top in ("shards", "heldout"):
        for stage, domains in manifest[top].items():
            for domain, entry in domains.items():
                yield f"{top}/{stage}/{domain}", entry


def _check_hash(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise DamagedData(f"{path} is missing: copy it again, or run the data step again")
    found = sha256_file(path)
    if found != sha256:
        raise DamagedData(
            f"{path} is damaged: its sha256 is {found}, not {sha256}; copy it again, or run the data step again"
        )
