"""Check a finished data folder, or a copy of one, against its manifest."""

import json
from collections.abc import Iterator
from pathlib import Path

from core.errors import RefusedInput
from data.files import sha256_file

MANIFEST = "data_manifest.json"


def verify(folder: Path) -> dict[str, int]:
    """Hash every index and every shard.

    The manifest has the sha256 of each index.json, and that the sha256 of its shards: one file stands for all.

    Returns:
        `domains`, `shards` and `bytes` looked at.
    Raises:
        RefusedInput: a file is missing, damaged or too many; names it and the way out.
    """
    recorded = folder / MANIFEST
    if not recorded.is_file():
        raise RefusedInput(f"{recorded} is missing: the folder is not a finished data step; run the data step again")
    manifest = json.loads(recorded.read_text())
    totals = {"domains": 0, "shards": 0, "bytes": 0}
    for target, entry in _targets(manifest):
        index = folder / target / "index.json"
        _check(index, entry["index_sha256"])
        files = [shard["zip_data"] or shard["raw_data"] for shard in json.loads(index.read_text())["shards"]]
        for file in files:
            _check(index.with_name(file["basename"]), file["hashes"]["sha256"])
        unknown = {path.name for path in index.parent.iterdir()} - {file["basename"] for file in files} - {"index.json"}
        if unknown:
            raise RefusedInput(f"{index.parent}: {sorted(unknown)} are not in index.json; remove them")
        totals["domains"] += 1
        totals["shards"] += len(files)
        totals["bytes"] += sum(file["bytes"] for file in files)
    return totals


def _targets(manifest: dict) -> Iterator[tuple[str, dict]]:
    for top in ("shards", "heldout"):
        for stage, domains in manifest[top].items():
            for domain, entry in domains.items():
                yield f"{top}/{stage}/{domain}", entry


def _check(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise RefusedInput(f"{path} is missing: copy it again, or run the data step again")
    found = sha256_file(path)
    if found != sha256:
        raise RefusedInput(
            f"{path} is damaged: its sha256 is {found}, not {sha256}; copy it again, or run the data step again"
        )
