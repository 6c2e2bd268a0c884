"""Writes MDS shards, and joins the shards of all tasks.

A task writes its part of every destination (`shards/pretrain/web`, `heldout/sft/math`, ...) below `parts/<rank>/`;
`assemble` joins the parts of a destination to one ordinary MDS folder. core/samples.py has the schema of the samples.
"""

import json
from pathlib import Path

from streaming import MDSWriter

from core.atomic import atomic_write, write_json
from core.hashing import sha256_file
from core.samples import SFT_COLUMNS, SHARD_HASH, TEXT_COLUMNS, VOCABULARY_KEY
from core.stages import heldout_folder
from data.catalogue.corpus import SHARDS_BY_KIND
from data.filters.split import HELDOUT

COMPRESSION = "zstd"
HASHES = ["sha256", SHARD_HASH]
"""Hashes of each shard in its index: a loader checks the fast one, data/tokens/verify_shards.py the other."""


def choose_destination(metadata: dict) -> str:
    """Return the folder of a document's shard, below the data folder, by its split, kind and domain."""
    split, kind, domain = metadata["split"], metadata["kind"], metadata["domain"]
    if split == HELDOUT:
        # The text stages share one held-out folder, so either of them gives it.
        return f"heldout/{heldout_folder(SHARDS_BY_KIND[kind][0])}/{domain}"
    return f"shards/{split}/{domain}"


def make_writer(folder: Path, kind: str, shard_bytes: int) -> MDSWriter:
    """Return an MDSWriter of the project's schema.

    Args:
        kind: `text` or `sft` (`Corpus.kind`), which says the columns.
        shard_bytes: largest uncompressed size of a shard.
    """
    columns = SFT_COLUMNS if kind == "sft" else TEXT_COLUMNS
    return MDSWriter(out=str(folder), columns=columns, compression=COMPRESSION, hashes=HASHES, size_limit=shard_bytes)


def assemble(parts: Path, out: Path, target: str, vocabulary: str) -> dict:
    """Join the parts of one destination to the MDS folder `out/target`; a complete folder is only read.

    Shards are renamed, not copied. An interruption leaves `<target>.partial`, and the next call continues in it.

    Args:
        vocabulary: `core.samples.hash_vocabulary` of the tokenizer that made the tokens.

    Returns:
        number of `shards`, their `compressed_bytes`, and `index_sha256`, which vouches for the shards too: the index
        holds their hashes.
    """
    final = out / target
    if not (final / "index.json").exists():
        with atomic_write(final, keep_partial=True) as partial:
            partial.mkdir(exist_ok=True)
            shards = _move_shards(parts, partial, target)
            write_json(partial / "index.json", {"version": 2, VOCABULARY_KEY: vocabulary, "shards": shards})
    shards = json.loads((final / "index.json").read_text())["shards"]
    return {
        "shards": len(shards),
        "compressed_bytes": sum(shard["zip_data"]["bytes"] for shard in shards),
        "index_sha256": sha256_file(final / "index.json"),
    }


def _move_shards(parts: Path, folder: Path, target: str) -> list[dict]:
    """Move the shards of every part to `folder` under consecutive numbers, and return their index entries."""
    shards: list[dict] = []
    for part in sorted(parts.glob(f"*/{target}")):
        for shard in json.loads((part / "index.json").read_text())["shards"]:
            for data in (shard["raw_data"], shard["zip_data"]):
                source = part / data["basename"]
                _, _, suffix = data["basename"].split(".", 2)
                data["basename"] = f"shard.{len(shards):05d}.{suffix}"
                # An interrupted call may have moved it already.
                if source.exists():
                    source.rename(folder / data["basename"])
            assert (folder / shard["zip_data"]["basename"]).exists(), f"{part} lost a shard"
            shards.append(shard)
    return shards
