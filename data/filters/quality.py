"""Repair, quality filters and redaction, chosen by the style of a document's writing (`Corpus.style`).

Web prose gets FineWeb's sequence (arXiv 2406.17557): language, Gopher repetition, Gopher quality, C4 without its
line-punctuation rule, FineWeb's own three rules. An encyclopedia gets the language filter and Gopher's two: the other
rules judge the lines of a page, and the text of a dump no longer has them. Documentation gets those of Gopher's quality
rules that formulas and examples do not break by their nature. Code and conversations pass: the rules are about prose.
"""

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import ftfy
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

from data.catalogue.corpus import Corpus, Style
from data.compat import bound_email_pattern, may_be_broken, read_filter_parameters
from data.config import DataConfig
from data.filters.language import make_language_filter
from data.filters.repetition import RepetitionFilter
from data.filters.spacy_cache import EnglishWords
from data.filters.time_limit import run_limited

REWRITTEN_STYLES: tuple[Style, ...] = ("prose", "encyclopedia", "documentation")
"""Styles that repair and redaction may change. In code and tool calls an address or an unusual character is the subject
of the text, and a conversation needs it unchanged in every turn."""
LANGUAGE_STYLES: tuple[Style, ...] = ("prose", "encyclopedia")
"""Styles that the language filter applies to: a classifier is unsure of code and formulas."""

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_DOTTED = re.compile(r"[0-9]\.[0-9]")


class StyleFilter(BaseFilter):
    """Applies a datatrove filter to the documents of some styles and passes all others.

    Args:
        skipped: names of corpora that pass, because their publishers have filtered them.
    """

    def __init__(self, inner: BaseFilter, styles: tuple[Style, ...], label: str, skipped: frozenset[str] = frozenset()):
        # The name comes first: datatrove names a block's statistics by it in `__init__`.
        self.name = label
        super().__init__()
        self.inner = inner
        self.styles = styles
        self.skipped = skipped

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return the inner filter's verdict and its reason; True for a document of another style."""
        if doc.metadata["style"] not in self.styles or doc.metadata.get("corpus") in self.skipped:
            return True
        verdict = run_limited(doc, self.name, partial(self.inner.filter, doc), otherwise=True)
        # The language filter gives no reason; the language that it found is one.
        return verdict if verdict is not False else (False, doc.metadata.pop("language", "dropped"))

    def description(self) -> dict:
        """Return the manifest's entry: the block, datatrove's version, the styles it applies to and its limits."""
        return {
            "label": self.name,
            "block": type(self.inner).__name__,
            "datatrove": importlib.metadata.version("datatrove"),
            "styles": list(self.styles),
            "skipped_corpora": sorted(self.skipped),
            "parameters": read_filter_parameters(self.inner),
        }


class _ProseOnly:
    """Lets a datatrove formatter change documents of REWRITTEN_STYLES only, and counts the changed ones."""

    name: str
    counter: str
    """Name of the counter of changed documents in the block's statistics."""
    track_time: Callable[[], AbstractContextManager]
    format: Callable[[str], str]
    skipped: frozenset[str] = frozenset()
    """Names of corpora that pass unchanged."""
    stat_update: Callable[[str], None]

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield every document, reformatted where its style allows it."""
        for document in data:
            done = document.metadata.get("corpus") in self.skipped
            if document.metadata["style"] in REWRITTEN_STYLES and not done:
                with self.track_time():
                    text = run_limited(
                        document, self.name, partial(self.format, document.text), otherwise=document.text
                    )
                if text != document.text:
                    self.stat_update(self.counter)
                    document.text = text
            yield document


class TextRepair(_ProseOnly, FTFYFormatter):
    """Repairs text as FineWeb does, with datatrove's block.

    It mends text that was decoded with the wrong encoding, replaces HTML entities, removes terminal escapes and control
    characters, and makes every line break LF. Quotes, widths and ligatures stay as they were written.
    """

    name = "repair"
    counter = "repaired"

    def __init__(self):
        super().__init__(fix_line_breaks=True)

    def format(self, text: str) -> str:
        """Return the repaired text. ftfy gets only the lines that it may change, and the result is that for the whole.

        Like ftfy, entities are replaced up to the first line with a "<": the rest may be HTML, which they belong to.
        """
        if not may_be_broken(text):
            return text
        config, lines = self.config, []
        for line in _LINE.findall(text):
            lines.append(ftfy.fix_text(line, config) if may_be_broken(line) else line)
            if "<" in line:
                config = config._replace(unescape_html=False)
        return "".join(lines)


class PIIRedaction(_ProseOnly, PIIFormatter):
    """Replaces e-mail and public IP addresses, with datatrove's block.

    Args:
        corpora: those of the run; the block leaves those alone whose publishers have replaced addresses.
    """

    name = "pii"
    counter = "redacted"

    def __init__(self, corpora: Sequence[Corpus] = ()):
        super().__init__()
        self.skipped = frozenset(corpus.name for corpus in corpora if corpus.pii_redacted)
        bound_email_pattern(self)

    def format(self, text: str) -> str:
        """Return the text with its addresses replaced; one without an @ or a dot between digits has none."""
        return super().format(text) if "@" in text or _DOTTED.search(text) else text


def make_quality_filters(skipped: frozenset[str] = frozenset()) -> list[StyleFilter]:
    """Return every quality filter in the order they run; `DataConfig.filters` chooses by their labels.

    Args:
        skipped: names of the corpora that pass.
    """
    # One instance for all filters, so that a text is split into words once.
    words = EnglishWords()
    # Examples repeat names and prompts (">>>"); the limits on symbols and letters would drop every page with formulas.
    documentation_quality = GopherQualityFilter(
        min_avg_word_length=2, max_symbol_word_ratio=None, max_non_alpha_words_ratio=0.4, language=words
    )
    blocks: list[tuple[BaseFilter, tuple[Style, ...], str]] = [
        (RepetitionFilter(language=words), ("prose",), "gopher_repetition"),
        (GopherQualityFilter(language=words), ("prose",), "gopher_quality"),
        (C4QualityFilter(filter_no_terminal_punct=False, language=words), ("prose",), "c4_quality"),
        (FineWebQualityFilter(language=words), ("prose",), "fineweb_quality"),
        (RepetitionFilter(language=words), ("encyclopedia",), "encyclopedia_repetition"),
        (GopherQualityFilter(language=words), ("encyclopedia",), "encyclopedia_quality"),
        (documentation_quality, ("documentation",), "documentation_quality"),
    ]
    return [StyleFilter(block, styles, label, skipped) for block, styles, label in blocks]


def make_filters(config: DataConfig, language_model: Path | None, corpora: Sequence[Corpus] = ()) -> list[StyleFilter]:
    """Return the filters of a config in the order they run: language, then the quality filters.

    Args:
        language_model: fastText's model file; without it the language filter is left out.
        corpora: those of the run; a filter passes those that their publishers have filtered.
    """
    filtered = frozenset(corpus.name for corpus in corpora if corpus.quality_filtered)
    chosen = [block for block in make_quality_filters(filtered) if block.name in config.filters]
    if config.languages and language_model:
        # The publishers kept English, which is no language to keep where the config names others only.
        english = frozenset(corpus.name for corpus in corpora if corpus.language_filtered and "en" in config.languages)
        language = make_language_filter(language_model, config.languages)
        return [StyleFilter(language, LANGUAGE_STYLES, "language", english), *chosen]
    return chosen
