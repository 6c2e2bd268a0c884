"""Corpora that a former data set finished, taken over into a new one instead of being computed again.

A data set keeps what this needs: the keys of its corpora in the manifest, shards whose names tell the corpus, and below
`corpora/<name>` the corpus's statistics and the hashes of its documents. Files are linked, not copied, where the file
system can do that, so the former folder may be deleted afterwards.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.atomic import atomic_write, link_file, partial_path, write_json
from data.corpus_keys import CorpusKeys
from data.report import shard_statistics
from data.tokens.mds import TOPS, name_shards
from data.tokens.verify_shards import MANIFEST

log = logging.getLogger(__name__)

CORPORA = "corpora"
"""Folder of a data set with what a later one needs of each corpus."""
SIGNATURES = "signatures"
"""Folder below `CORPORA/<name>` with the hashes of the corpus's documents."""
RECORD = "former.json"
"""File below `work` that says what was taken over; an interrupted preparation goes on with the same corpora."""


@dataclass(frozen=True)
class TakenCorpus:
    """A corpus of a former data set, whose files have been linked."""

    entry: dict[str, Any]
    """The manifest's entry of the corpus."""
    shards: dict[str, list[dict[str, Any]]]
    """Destination (`shards/pretrain/web`) -> the corpus's entries in its index, in order."""


def take_corpora(former: Sequence[Path], keys: CorpusKeys, out: Path) -> dict[str, TakenCorpus]:
    """Link the finished corpora of former data sets into the folder `out`, and return them by name.

    Args:
        former: folders that may hold finished data sets; those that hold none are passed over.
        keys: the keys of the new data set's corpora, which say what is the same.
    """
    record = out / "work" / RECORD
    if record.exists():
        kept = json.loads(record.read_text(encoding="utf-8"))
        return {name: TakenCorpus(**corpus) for name, corpus in kept.items()}
    taken: dict[str, TakenCorpus] = {}
    for folder in former:
        manifest = _read_manifest(folder)
        for name, key in manifest["keys"]["corpora"].items():
            if key == keys.corpora.get(name) and name not in taken:
                entry = manifest["corpora"][name]
                taken[name] = TakenCorpus(entry, _link_corpus(folder, name, entry["content"], out))
                log.info("corpus %s: taken over from %s", name, folder)
    write_json(record, {name: asdict(corpus) for name, corpus in taken.items()})
    return taken


def take_tokenizer(former: Sequence[Path], key: str, folder: Path) -> bool:
    """Copy the tokenizer of a former data set that has the key to `folder`; return whether there is one."""
    for other in former:
        if _read_manifest(other)["keys"]["tokenizer"] == key:
            with atomic_write(folder) as partial:
                shutil.copytree(other / "tokenizer", partial)
            return True
    return False


def keep_statistics(out: Path, name: str, parts: Sequence[Path]) -> None:
    """Write the statistics of a corpus, the sum over its parts, to where a later data set finds them."""
    folder = out / CORPORA / name
    folder.mkdir(parents=True, exist_ok=True)
    shard_statistics.save(shard_statistics.load(parts), folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a data set; one without keys where there is none, or of a version without them."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {"keys": {"corpora": {}, "tokenizer": None}} | manifest


def _link_corpus(folder: Path, name: str, content: str, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Link the shards of a corpus, what was set aside of it, its statistics and its documents' hashes into `out`.

    Returns:
        its entries in the index of each destination.
    """
    entries: dict[str, list[dict[str, Any]]] = {}
    for index in sorted(file for top in TOPS for file in folder.glob(f"{top}/*/*/index.json")):
        target = index.parent.relative_to(folder).as_posix()
        for shard in json.loads(index.read_text(encoding="utf-8"))["shards"]:
            basename = shard["zip_data"]["basename"]
            if basename.startswith(f"{name_shards(name, content)}."):
                link_file(index.with_name(basename), partial_path(out / target) / basename)
                entries.setdefault(target, []).append(shard)
    for pattern in (f"set_aside/**/{name}.*", f"{CORPORA}/{name}/**/*"):
        for file in folder.glob(pattern):
            if file.is_file():
                link_file(file, out / file.relative_to(folder))
    return entries
