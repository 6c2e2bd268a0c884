"""The types of the catalogue: a corpus, its source, and the units of it that tasks work on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

TEXT_DOMAINS = ("web", "math", "code", "knowledge", "science")
SFT_DOMAINS = ("chat", "math", "code", "tool_use", "reasoning", "safety", "science")
SHARDS_BY_KIND: dict[str, tuple[str, ...]] = {"text": ("pretrain", "midtrain"), "sft": ("sft",)}
"""Kind of a corpus -> the folders below `shards/` (core.stages.SHARD_FOLDERS) that its documents may go to."""

Style = Literal["prose", "encyclopedia", "documentation", "code", "conversation"]
"""Style of writing, by which data/filters/quality.py chooses the quality filters."""


class Requirement(NamedTuple):
    """A distribution to fetch from a package registry."""

    requirement: str
    """Requirement for pip, for example `gensim==4.4.0`."""
    sdist: bool
    """Whether to fetch the source distribution (the wheel lacks the data) instead of the wheel."""


@dataclass(frozen=True)
class PackageFile:
    """A file inside of a distribution.

    Attributes:
        package: key of data.catalogue.corpora.PACKAGES.
        member: path inside the distribution; one that ends in "/" stands for every file below it.
    """

    package: str
    member: str


@dataclass(frozen=True)
class Installed:
    """Distributions of the running Python environment.

    `python` stands for the interpreter with its standard library, `*` for all installed distributions.
    """

    distributions: tuple[str, ...]


@dataclass(frozen=True)
class RemoteFiles:
    """Files under an fsspec address that match a glob pattern.

    Attributes:
        address: `hf://datasets/...`, `s3://...`, a local folder, ... Only the pattern is a pattern.
        columns: fields that the reader takes, in the order that its docstring states. Of a parquet file only these are
            fetched.
    """

    address: str
    pattern: str
    columns: tuple[str, ...] = ("text",)


@dataclass(frozen=True)
class Corpus:
    """One entry of the catalogue.

    Attributes:
        domain: one of TEXT_DOMAINS or SFT_DOMAINS, by which a stage's mixture weighs it.
        kind: `text` feeds pre-training and mid-training, `sft` instruction tuning and QAT.
        licence: licence that the source states; where a package redistributes data of others, that of the data.
        read: function that yields records, `{"text": str}` for text and `{"messages": [{"role", "content"}]}` for sft;
            a row that cannot be used is `{"malformed": reason, "raw": str}`, and one that is left out on purpose
            `{"excluded": reason, "raw": str}` (data/readers/rows.py).
        text_bytes: estimate of the UTF-8 bytes that it yields, for the disk check.
        shards: number of units that the corpus is divided into, each read by one task; files under an address are
            divided by their sizes instead (data/sources.py).
        stages: stages that a text corpus feeds; `midtrain_fraction` divides a corpus that feeds both.
        non_commercial: whether the licence, or the terms of access, forbid commercial use.
        tokens, documents: size that the publisher states; None where no figure is published.
        deduplicated: reason why near duplicates are not searched for in a corpus of the kind `text`: what its publisher
            did, with the source. Empty where they are.
        language_filtered, quality_filtered, pii_redacted: reason why the language filter (to English), the quality
            filters and the redaction of addresses leave the corpus alone: what its publisher did, with the source.
            Empty where they run.
        max_documents: largest number of records read, an equal part of it from each unit; None reads all.
        fallback: name of the corpus to read instead where the package registry did not answer.
    """

    name: str
    domain: str
    kind: Literal["text", "sft"]
    style: Style
    licence: str
    source: PackageFile | Installed | RemoteFiles
    read: Callable[["Unit"], Iterator[dict]] = field(repr=False)
    text_bytes: int
    shards: int = 1
    stages: tuple[str, ...] = SHARDS_BY_KIND["text"]
    non_commercial: bool = False
    tokens: float | None = None
    documents: int | None = None
    deduplicated: str = ""
    language_filtered: str = ""
    quality_filtered: str = ""
    pii_redacted: str = ""
    max_documents: int | None = None
    fallback: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Folders below `shards/` that the corpus's documents go to, apart from those held out."""
        return self.stages if self.kind == "text" else SHARDS_BY_KIND[self.kind]


@dataclass(frozen=True)
class Unit:
    """The piece of a corpus that one task reads."""

    corpus: Corpus
    location: str
    """Path of the wheel or sdist, or address of the remote files; empty for installed sources."""
    shard: int
    """Number of the unit among the corpus's."""
    seed: int
    """Seed of generated corpora."""
    files: tuple[str, ...] | None = None
    """Paths of the remote files on their file system; None stands for all of the corpus."""
    text_bytes: int = 0
    """Estimate of the UTF-8 bytes that the unit yields."""
    parts: int = 1
    """Number of the corpus's units."""

    @property
    def label(self) -> str:
        """Name of the unit in file names and messages: `<corpus>.<shard>`."""
        return f"{self.corpus.name}.{self.shard:05d}"
