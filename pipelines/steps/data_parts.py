"""The parts of the data step's output, each with an identity of its own: what one training stage reads."""

import json
from pathlib import Path

from core.hashing import sha256_json
from core.stages import SHARD_FOLDERS, heldout_folder


def identify_parts(data: Path) -> dict[str, str]:
    """Return the identity of each part of a finished data folder: folder of shards -> 16 hex digits.

    A part is the shards of a folder, the held-out shards that go with them, and the tokenizer. The manifest holds the
    SHA-256 of each index.json, and an index those of its shards. So a part that was written anew with the same bytes
    keeps its identity, whatever else the data step has changed.
    """
    manifest = json.loads((data / "data_manifest.json").read_text(encoding="utf-8"))

    def list_indexes(top: str, folder: str) -> dict[str, str]:
        return {domain: entry["index_sha256"] for domain, entry in manifest[top].get(folder, {}).items()}

    return {
        folder: sha256_json(
            {
                "tokenizer": manifest["tokenizer"]["sha256"],
                "shards": list_indexes("shards", folder),
                "heldout": list_indexes("heldout", heldout_folder(folder)),
            }
        )[:16]
        for folder in SHARD_FOLDERS
    }
