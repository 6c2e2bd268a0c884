"""Writes MDS shards, and joins the shards of all tasks.

A task writes its part of every destination (`shards/pretrain/web`, `heldout/sft/math`, ...) below `parts/<rank>/`;
`assemble` joins the parts of a destination to one ordinary MDS folder. core/samples.py has the schema of the samples.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from streaming import MDSWriter

from core.atomic import atomic_write, write_json
from core.hashing import sha256_file, sha256_json
from core.samples import SFT_COLUMNS, SHARD_HASH, TEXT_COLUMNS, VOCABULARY_KEY
from core.shard_columns import COLUMNS_FILE, write_columns
from core.stages import heldout_folder
from data.catalogue.corpus import SHARDS_BY_KIND
from data.filters.split import HELDOUT

TOPS = ("shards", "heldout")
"""Folders of a data set that hold MDS folders, by stage and domain."""
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


def hash_content(parts: Sequence[Path]) -> str:
    """Return a hash over all shards of a corpus, from the indexes of its parts."""
    shards = [
        [index.parent.relative_to(part).as_posix(), shard["zip_data"]["hashes"]["sha256"]]
        for part in parts
        for index in sorted(part.glob("*/*/*/index.json"))
        for shard in json.loads(index.read_text())["shards"]
    ]
    return sha256_json(shards)[:16]


def name_shards(corpus: str, content: str) -> str:
    """Return what the names of a corpus's shards begin with.

    A name stands for one content only, and a data set to which corpora were added has the shards of the others under
    the same names.

    Args:
        content: `hash_content` of the corpus.
    """
    return f"{corpus}-{content[:8]}"


def assemble(parts: Sequence[tuple[str, Path | list[dict]]], out: Path, target: str, vocabulary: str) -> dict:
    """Join the parts of one destination to the MDS folder `out/target`; a complete folder is only read.

    Shards are renamed, not copied. An interruption leaves `<target>.partial`, and the next call continues in it.

    Args:
        parts: in the order of the corpora, each with what the names of its shards begin with: folder of a task, or the
            entries of an index whose shards lie in `<target>.partial` already.
        vocabulary: `core.samples.hash_vocabulary` of the tokenizer that made the tokens.

    Returns:
        number of `shards`, their `compressed_bytes`, and `index_sha256`, which vouches for the shards too: the index
        holds their hashes.
    """
    final = out / target
    if not (final / "index.json").exists():
        with atomic_write(final, keep_partial=True) as partial:
            partial.mkdir(exist_ok=True)
            shards: list[dict] = []
            numbers: Counter[str] = Counter()
            for beginning, part in parts:
                if isinstance(part, list):
                    shards += part
                else:
                    shards += _move_shards(part / target, partial, beginning, numbers)
            write_json(partial / "index.json", {"version": 2, VOCABULARY_KEY: vocabulary, "shards": shards})
            write_columns(partial / "index.json", partial / COLUMNS_FILE)
    shards = json.loads((final / "index.json").read_text())["shards"]
    return {
        "shards": len(shards),
        "compressed_bytes": sum(shard["zip_data"]["bytes"] for shard in shards),
        "index_sha256": sha256_file(final / "index.json"),
    }


def _move_shards(part: Path, folder: Path, beginning: str, numbers: Counter[str]) -> list[dict]:
    """Move the shards of a part, which may have none, to `folder`, and return their index entries.

    Args:
        numbers: number of shards with each beginning so far, which is increased.
    """
    shards: list[dict] = []
    for shard in json.loads((part / "index.json").read_text())["shards"] if part.is_dir() else []:
        for data in (shard["raw_data"], shard["zip_data"]):
            source = part / data["basename"]
            _, _, suffix = data["basename"].split(".", 2)
            data["basename"] = f"{beginning}.{numbers[beginning]:05d}.{suffix}"
            # An interrupted call may have moved it already.
            if source.exists():
                source.rename(folder / data["basename"])
        numbers[beginning] += 1
        assert (folder / shard["zip_data"]["basename"]).exists(), f"{part} lost a shard"
        shards.append(shard)
    return shards
