"""The MDS sample schema, written down once, and the functions that write and join shards.

A task writes its part of every destination (`shards/pretrain/web`, `heldout/sft/math`, ...) below `parts/<rank>/`;
`assemble` joins the parts of a destination into one ordinary MDS folder.
"""

import hashlib
import json
from pathlib import Path

from streaming import MDSWriter

from data.files import sha256_file, write_json

TEXT_COLUMNS = {"tokens": "ndarray:uint32"}
"""One document: bos ... eos."""
SFT_COLUMNS = {"tokens": "ndarray:uint32", "loss_mask": "ndarray:uint8"}
"""One conversation; loss_mask is 1 on the assistant's contents and the tokens that close them."""
COMPRESSION = "zstd"
HASHES = ["sha256", "xxh64"]
"""xxh64 is what a loader checks at every start, sha256 what shows that nobody changed a shard (data/tokens/verify_shards.py)."""
VOCABULARY_KEY = "vocabulary_sha256"
"""Key of index.json, beside MDS's own: whose token ids these are. A loader compares it with its tokenizer."""


def vocabulary_sha256(vocabulary: dict[str, int]) -> str:
    """What token ids mean, as one hash: sha256 of `id<TAB>token<LF>` in the order of the ids, UTF-8.

    Independent of file format and library version; two tokenizers that share it read each other's shards.
    """
    lines = (f"{index}\t{token}\n" for token, index in sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def destination(metadata: dict) -> str:
    """Folder of a document's shard below the data folder, from its split, kind and domain."""
    split, kind, domain = metadata["split"], metadata["kind"], metadata["domain"]
    if split == "heldout":
        return f"heldout/{'sft' if kind == 'sft' else 'pretrain'}/{domain}"
    return f"shards/{split}/{domain}"


def writer(folder: Path, kind: str, shard_bytes: int) -> MDSWriter:
    """An MDSWriter of the project's schema."""
    columns = SFT_COLUMNS if kind == "sft" else TEXT_COLUMNS
    return MDSWriter(out=str(folder), columns=columns, compression=COMPRESSION, hashes=HASHES, size_limit=shard_bytes)


def assemble(parts: Path, out: Path, target: str, vocabulary: str) -> dict:
    """Join the parts of one destination into the MDS folder `out/target`; only looked at where it is complete.

    Shards are renamed, not copied. An interruption leaves `<target>.partial`, which the next call goes on with.

    Args:
        vocabulary: `vocabulary_sha256` of the tokenizer that made the tokens.
    Returns:
        `shards`, their `compressed_bytes`, and `index_sha256`, which stands for all of it: the index has their hashes.
    """
    final = out / target
    if not (final / "index.json").exists():
        beside = final.with_name(final.name + ".partial")
        beside.mkdir(parents=True, exist_ok=True)
        index = {"version": 2, VOCABULARY_KEY: vocabulary, "shards": _join(parts, beside, target)}
        write_json(beside / "index.json", index)
        beside.rename(final)
    shards = json.loads((final / "index.json").read_text())["shards"]
    return {
        "shards": len(shards),
        "compressed_bytes": sum(shard["zip_data"]["bytes"] for shard in shards),
        "index_sha256": sha256_file(final / "index.json"),
    }


def _join(parts: Path, beside: Path, target: str) -> list[dict]:
    """Move every part's shards to `beside` under running numbers; their entries for the common index."""
    shards = []
    for part in sorted(parts.glob(f"*/{target}")):
        for shard in json.loads((part / "index.json").read_text())["shards"]:
            for data in (shard["raw_data"], shard["zip_data"]):
                source = part / data["basename"]
                _, _, suffix = data["basename"].split(".", 2)
                data["basename"] = f"shard.{len(shards):05d}.{suffix}"
                if source.exists():
                    source.rename(beside / data["basename"])
            assert (beside / shard["zip_data"]["basename"]).exists(), f"{part} lost a shard"
            shards.append(shard)
    return shards
