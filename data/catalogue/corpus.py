"""What a corpus is: its source, its licence, how it is read, and the pieces that tasks work on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

TEXT_DOMAINS = ("web", "math", "code", "knowledge", "science")
SFT_DOMAINS = ("chat", "math", "code", "tool_use", "reasoning", "safety", "science")
TEXT_STAGES = ("pretrain", "midtrain")

Style = Literal["prose", "encyclopedia", "documentation", "code", "conversation"]
"""What kind of writing it is; `data.filters` chooses the quality filters by it."""


class Requirement(NamedTuple):
    """A distribution to fetch from a package registry."""

    requirement: str
    """For pip, for example `gensim==4.4.0`."""
    sdist: bool
    """True: the source distribution is wanted (the wheel lacks the data); False: the wheel."""


@dataclass(frozen=True)
class PackageFile:
    """`member` inside the distribution `package` (a key of PACKAGES); a folder takes every file below it."""

    package: str
    member: str


@dataclass(frozen=True)
class Installed:
    """Distributions of the running Python environment; `python` is the interpreter and its standard library."""

    distributions: tuple[str, ...]


@dataclass(frozen=True)
class RemoteFiles:
    """Files under an fsspec address (`hf://datasets/...`, `s3://...`, a local folder) that match a glob pattern.

    `columns` are the fields the reader takes, in the order it names them; nothing else is fetched of a parquet file.
    """

    address: str
    pattern: str
    columns: tuple[str, ...] = ("text",)


@dataclass(frozen=True)
class Corpus:
    """One entry of the catalogue.

    Attributes:
        kind: `text` feeds pre-training and mid-training, `sft` instruction tuning and QAT.
        licence: what the source states; where a package redistributes somebody's data, the data's own.
        read: yields records, `{"text": str}` for text and `{"messages": [{"role", "content"}]}` for sft; a row it
            cannot parse is `{"malformed": reason, "raw": str}`.
        text_bytes: estimate of the UTF-8 bytes it yields, for the disk check.
        shards: independent pieces read by as many tasks.
        stages: of a text corpus, the stages it feeds; one that feeds both is divided by `midtrain_fraction`.
        non_commercial: the licence, or the terms of access, forbid commercial use.
        tokens, documents: size as its publisher states it; None where no figure is published.
        max_documents: cap on the records read, each shard its part; None reads all.
        fallback: corpus to read instead where the package registry did not answer.
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
    stages: tuple[str, ...] = TEXT_STAGES
    non_commercial: bool = False
    tokens: float | None = None
    documents: int | None = None
    max_documents: int | None = None
    fallback: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Folders of `shards/` that its documents go to."""
        return ("sft",) if self.kind == "sft" else self.stages


@dataclass(frozen=True)
class Unit:
    """One task's piece of one corpus."""

    corpus: Corpus
    location: str
    """Path of the wheel or sdist, or address of the remote files; empty for installed sources."""
    shard: int
    seed: int
