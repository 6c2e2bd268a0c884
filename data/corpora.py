"""The catalogue: every corpus a recipe may name, with its domain, licence, source and reader.

Three kinds of source:
  PackageFile   one file inside a wheel or sdist that a package registry serves (small, real samples)
  Installed     what the machine already has: the standard library, installed distributions, a generator
  RemoteFiles   parquet or jsonl files under any fsspec address (the corpora of the published recipe)

A licence is what the source states; where a package redistributes somebody's data, the data's own licence is named.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from data import hub, instructions, texts, toolcalls
from data.config import DataConfig

TEXT_DOMAINS = ("web", "math", "code", "knowledge", "science")
SFT_DOMAINS = ("chat", "math", "code", "tool_use", "reasoning", "safety", "science")

Style = Literal["prose", "encyclopedia", "documentation", "code", "conversation"]
"""What kind of writing it is; `data.filters` chooses the quality filters by it."""


class Requirement(NamedTuple):
    """A distribution to fetch from a package registry."""

    requirement: str
    """For pip, for example `gensim==4.4.0`."""
    sdist: bool
    """True: the source distribution is wanted (the wheel lacks the data); False: the wheel."""


PACKAGES: dict[str, Requirement] = {
    "llamafactory": Requirement("llamafactory==0.9.5", sdist=True),
    "gensim": Requirement("gensim==4.4.0", sdist=False),
    "chatterbot-corpus": Requirement("chatterbot-corpus==1.3.3", sdist=False),
}

WIKIPEDIA_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


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
    """Files under an fsspec address (`hf://datasets/...`, `s3://...`, a local folder) that match a glob pattern."""

    address: str
    pattern: str


@dataclass(frozen=True)
class Corpus:
    """One entry of the catalogue.

    Attributes:
        kind: `text` feeds pre-training and mid-training, `sft` instruction tuning and QAT.
        read: yields records, `{"text": str}` for text and `{"messages": [{"role", "content"}]}` for sft; a row it
            cannot parse is `{"malformed": reason, "raw": str}`.
        text_bytes: estimate of the UTF-8 bytes it yields, for the disk check.
        shards: independent pieces read by as many tasks.
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
    max_documents: int | None = None
    fallback: str | None = None


@dataclass(frozen=True)
class Unit:
    """One task's piece of one corpus."""

    corpus: Corpus
    location: str
    """Path of the wheel or sdist, or address of the remote files; empty for installed sources."""
    shard: int
    seed: int


_ENTRIES = (
    # Text, small samples.
    Corpus(
        "c4-sample", "web", "text", "prose", "ODC-BY-1.0 (C4)",
        PackageFile("llamafactory", "data/c4_demo.jsonl"), texts.read_jsonl, text_bytes=750_000,
        fallback="package-descriptions",
    ),
    Corpus(
        "package-descriptions", "web", "text", "prose", "each distribution's own, permissive ones only",
        Installed(("*",)), texts.read_package_descriptions, text_bytes=2_800_000,
    ),
    Corpus(
        "wikipedia-plain", "knowledge", "text", "encyclopedia", "CC-BY-SA (Wikipedia)",
        PackageFile("llamafactory", "data/wiki_demo.txt"), texts.read_lines, text_bytes=1_030_000,
        fallback="python-topics",
    ),
    Corpus(
        "wikipedia-dump", "knowledge", "text", "encyclopedia", "CC-BY-SA-3.0 (Wikipedia)",
        PackageFile("gensim", f"gensim/test/test_data/{WIKIPEDIA_DUMP}"),
        texts.read_wikipedia_dump, text_bytes=3_500_000, fallback="python-topics",
    ),
    Corpus(
        "python-topics", "knowledge", "text", "documentation", "PSF-2.0",
        Installed(("python",)), texts.read_python_topics, text_bytes=470_000,
    ),
    Corpus(
        "python-stdlib", "code", "text", "code", "PSF-2.0",
        Installed(("python",)), texts.read_stdlib, text_bytes=5_000_000, max_documents=240,
    ),
    Corpus(
        "sympy-docs", "math", "text", "documentation", "BSD-3-Clause",
        Installed(("sympy",)), texts.read_docstrings, text_bytes=2_000_000, max_documents=1600,
    ),
    Corpus(
        "scipy-docs", "science", "text", "documentation", "BSD-3-Clause",
        Installed(("scipy",)), texts.read_docstrings, text_bytes=1_500_000, max_documents=600,
    ),
    Corpus(
        "sklearn-docs", "science", "text", "documentation", "BSD-3-Clause",
        Installed(("scikit-learn",)), texts.read_docstrings, text_bytes=1_300_000, max_documents=600,
    ),
    # Instructions, small samples.
    Corpus(
        "dialogues", "chat", "sft", "conversation", "BSD (chatterbot-corpus)",
        PackageFile("chatterbot-corpus", "chatterbot_corpus/data/english/"), instructions.read_dialogues,
        text_bytes=250_000, fallback="stdlib-questions",
    ),
    Corpus(
        "stdlib-questions", "chat", "sft", "conversation", "PSF-2.0",
        Installed(("python",)), instructions.read_stdlib_questions, text_bytes=400_000, max_documents=1500,
    ),
    Corpus(
        "tool-calls", "tool_use", "sft", "conversation", "Apache-2.0 (glaive-function-calling)",
        PackageFile("llamafactory", "data/glaive_toolcall_en_demo.json"), instructions.read_tool_calls,
        text_bytes=740_000, fallback="generated-tool-calls",
    ),
    Corpus(
        "generated-tool-calls", "tool_use", "sft", "conversation", "generated by this program",
        Installed(("python",)), toolcalls.read_generated, text_bytes=300_000,
    ),
    Corpus(
        "stdlib-functions", "code", "sft", "conversation", "PSF-2.0",
        Installed(("python",)), instructions.read_stdlib_functions, text_bytes=1_500_000, max_documents=1200,
    ),
    Corpus(
        "reasoning-gym-math", "math", "sft", "conversation", "Apache-2.0",
        Installed(("reasoning-gym",)), partial(instructions.read_reasoning_gym, tasks=instructions.MATH_TASKS),
        text_bytes=600_000,
    ),
    Corpus(
        "reasoning-gym-logic", "reasoning", "sft", "conversation", "Apache-2.0",
        Installed(("reasoning-gym",)), partial(instructions.read_reasoning_gym, tasks=instructions.LOGIC_TASKS),
        text_bytes=900_000,
    ),
    Corpus(
        "alpaca-sample", "chat", "sft", "conversation", "CC-BY-NC-4.0 (non-commercial)",
        PackageFile("llamafactory", "data/alpaca_en_demo.json"), instructions.read_alpaca, text_bytes=860_000,
    ),
    *hub.entries(Corpus, RemoteFiles),
)  # fmt: skip

CATALOGUE: dict[str, Corpus] = {corpus.name: corpus for corpus in _ENTRIES}

SMOKE_CORPORA: tuple[str, ...] = (
    "c4-sample", "package-descriptions", "wikipedia-plain", "wikipedia-dump", "python-stdlib", "sympy-docs",
    "scipy-docs", "sklearn-docs", "dialogues", "tool-calls", "stdlib-functions", "reasoning-gym-math",
    "reasoning-gym-logic",
)  # fmt: skip


def packages_needed(config: DataConfig) -> dict[str, Requirement]:
    """Registry packages that the chosen corpora want: distribution name -> what to fetch."""
    sources = [CATALOGUE[name].source for name in config.corpora]
    names = {source.package for source in sources if isinstance(source, PackageFile)}
    return {name: PACKAGES[name] for name in sorted(names)}


def resolve(config: DataConfig, packages: dict[str, Path]) -> tuple[list[Corpus], list[dict]]:
    """Choose what is really read.

    Returns:
        the corpora in reading order (text first, as `data.pipeline` expects), and one
        `{"corpus", "package", "fallback"}` for each corpus whose package is missing.
    """
    chosen: dict[str, Corpus] = {}
    missing = []
    for name in config.corpora:
        corpus = CATALOGUE[name]
        if isinstance(corpus.source, PackageFile) and corpus.source.package not in packages:
            missing.append({"corpus": name, "package": corpus.source.package, "fallback": corpus.fallback})
            if corpus.fallback is None:
                continue
            corpus = CATALOGUE[corpus.fallback]
        chosen[corpus.name] = corpus
    return sorted(chosen.values(), key=lambda corpus: corpus.kind != "text"), missing


def units(corpora: list[Corpus], packages: dict[str, Path], seed: int) -> list[Unit]:
    """Cut the corpora into tasks; the position in the list is the rank in every datatrove step."""
    found = []
    for corpus in corpora:
        source = corpus.source
        location = ""
        if isinstance(source, PackageFile):
            location = str(packages[source.package])
        elif isinstance(source, RemoteFiles):
            location = source.address
        found += [Unit(corpus, location, shard, seed) for shard in range(corpus.shards)]
    return found
