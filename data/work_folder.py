"""The folder that the data step writes: what identifies the work in it, and what becomes of that of another plan."""

import dataclasses
import json
import logging
import os
from pathlib import Path

from core.atomic import find_free_path, remove, write_json
from core.hashing import sha256_file
from data.catalogue.corpus import Corpus, PackageFile, RemoteFiles
from data.config import RUNTIME_FIELDS, VERSION, DataConfig
from data.former_corpora import CORPORA
from data.mixture import choose_heldout_fraction
from data.readers.remote_files import make_absolute
from data.tokens.tokenizer_files import hash_tokenizer_files
from data.tokens.verify_shards import MANIFEST, PAGE

log = logging.getLogger(__name__)

OUTPUTS = ("work", "set_aside", "tokenizer", "shards", "heldout", CORPORA, PAGE, MANIFEST)
"""Files and folders that `prepare` writes below `out`. `set_aside` holds the rejected rows and documents."""


def make_plan(
    config: DataConfig,
    seed: int,
    corpora: list[Corpus],
    packages: dict[str, Path],
    language_wheel: Path | None,
    benchmark_texts: Path | None,
) -> dict:
    """Return the identity of the work in an `out` folder: config, sources and the hashes of the inputs.

    It has passed through JSON, so that it equals what is read back from a file (tuples are lists).
    """
    archives = {str(packages[c.source.package]) for c in corpora if isinstance(c.source, PackageFile)}
    archives |= {str(language_wheel)} if language_wheel else set()
    remote = {c.name: c.source for c in corpora if isinstance(c.source, RemoteFiles)}
    return json.loads(
        json.dumps(
            {
                "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in RUNTIME_FIELDS},
                "seed": seed,
                "version": VERSION,
                "corpora": [corpus.name for corpus in corpora],
                # They follow from the catalogue's tokens too, which another version may count anew.
                "heldout_fractions": {corpus.name: choose_heldout_fraction(config, corpus) for corpus in corpora},
                "addresses": {
                    name: [make_absolute(source.address), source.pattern, source.columns]
                    for name, source in remote.items()
                },
                "packages_sha256": {Path(archive).name: sha256_file(Path(archive)) for archive in sorted(archives)},
                "benchmark_texts_sha256": sha256_file(benchmark_texts) if benchmark_texts else None,
                "tokenizer_sha256": hash_tokenizer_files(config.tokenizer.path) if config.tokenizer.path else {},
            }
        )
    )


def is_finished(out: Path, plan: dict) -> bool:
    """Return whether the folder holds the finished work of this plan, after putting the work of any other plan aside.

    It may be days of work, and the other plan a slip: it moves to `<out>.former`, or to the next number of that.
    """
    finished = out / MANIFEST
    if finished.exists() and json.loads(finished.read_text())["plan"] == plan:
        # A run may have been killed between the manifest and the removal of its working files.
        remove(out / "work")
        return True
    recorded = out / "work" / "plan.json"
    if not recorded.exists() or json.loads(recorded.read_text()) != plan:
        found = [name for name in OUTPUTS if (out / name).exists()]
        is_begun = found != ["work"] or any(path != recorded for path in (out / "work").iterdir())
        if found and is_begun:
            former = find_free_path(out.with_name(f"{out.name}.former"))
            former.mkdir()
            for name in found:
                os.replace(out / name, former / name)
            named = ", ".join(found)
            log.warning("%s: of another configuration or other inputs, so it was put aside in %s", named, former)
        write_json(recorded, plan)
    return False
