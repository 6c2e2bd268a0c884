"""Repair, filters and redaction, by what kind of writing a document is.

Web prose gets FineWeb's sequence (arXiv 2406.17557): language, Gopher repetition, Gopher quality, C4 without its
line-punctuation rule, FineWeb's own three rules. An encyclopedia gets language and Gopher's: the rules about lines
judge a page's layout, which a dump has lost. Documentation keeps the rules that formulas and examples do not break by
their nature. Code and conversations pass: these heuristics are about prose.
"""

import importlib.metadata
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter

from data.catalogue.corpus import Style
from data.config import DataConfig
from data.filters.language import language_filter
from data.filters.repetition import RepetitionFilter
from data.filters.spacy_cache import EnglishWords

REWRITTEN_STYLES: tuple[Style, ...] = ("prose", "encyclopedia", "documentation")
"""An address or an odd character in code or in a tool call is what the text is about, and has to be the same in every
turn."""
LANGUAGE_STYLES: tuple[Style, ...] = ("prose", "encyclopedia")


class StyleFilter(BaseFilter):
    """Applies a datatrove filter to documents of some styles and passes the others."""

    def __init__(self, inner: BaseFilter, styles: tuple[Style, ...], label: str):
        # datatrove names a block's statistics when it is initialised.
        self.name = label
        super().__init__()
        self.inner = inner
        self.styles = styles

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["style"] not in self.styles:
            return True
        verdict = self.inner.filter(doc)
        # The language filter gives no reason of its own.
        return verdict if verdict is not False else (False, doc.metadata.pop("language", "dropped"))

    def description(self) -> dict:
        """For the manifest: which block of which library, on what, with what limits."""
        parameters = {k: v for k, v in vars(self.inner).items() if isinstance(v, int | float | str | bool | list)}
        return {
            "label": self.name,
            "block": type(self.inner).__name__,
            "datatrove": importlib.metadata.version("datatrove"),
            "styles": list(self.styles),
            "parameters": {k: v for k, v in sorted(parameters.items()) if not k.startswith("_")},
        }


class _InProse:
    """Of a datatrove formatter: changes documents of REWRITTEN_STYLES alone, and counts those it changed."""

    counter: str

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            if document.metadata["style"] in REWRITTEN_STYLES:
                with self.track_time():
                    text = self.format(document.text)
                if text != document.text:
                    self.stat_update(self.counter)
                    document.text = text
            yield document


class TextRepair(_InProse, FTFYFormatter):
    """datatrove's repair, as FineWeb's: text decoded with the wrong encoding, HTML entities, terminal escapes, control
    characters; line breaks become LF too. Quotes, widths and ligatures stay as they were written.
    """

    name = "repair"
    counter = "repaired"

    def __init__(self):
        super().__init__(fix_line_breaks=True)


class PIIRedaction(_InProse, PIIFormatter):
    """datatrove's replacement of e-mail and public IP addresses."""

    name = "pii"
    counter = "redacted"


def quality_filters() -> list[StyleFilter]:
    """Every quality filter, in the order they run; `DataConfig.filters` chooses by their labels."""
    words = EnglishWords()
    # Examples repeat names and prompts (">>>"); the limits on symbols and letters would drop every page with formulas.
    documentation_quality = GopherQualityFilter(
        min_avg_word_length=2, max_symbol_word_ratio=None, max_non_alpha_words_ratio=0.4, language=words
    )
    return [
        StyleFilter(RepetitionFilter(language=words), ("prose",), "gopher_repetition"),
        StyleFilter(GopherQualityFilter(language=words), ("prose",), "gopher_quality"),
        StyleFilter(C4QualityFilter(filter_no_terminal_punct=False, language=words), ("prose",), "c4_quality"),
        StyleFilter(FineWebQualityFilter(language=words), ("prose",), "fineweb_quality"),
        StyleFilter(RepetitionFilter(language=words), ("encyclopedia",), "encyclopedia_repetition"),
        StyleFilter(GopherQualityFilter(language=words), ("encyclopedia",), "encyclopedia_quality"),
        StyleFilter(documentation_quality, ("documentation",), "documentation_quality"),
    ]


def chosen_filters(config: DataConfig, language_model: Path | None) -> list[StyleFilter]:
    """The filters of a config, in order: language first (where its model is there), then the quality filters."""
    chosen = [block for block in quality_filters() if block.name in config.filters]
    if config.languages and language_model:
        language = language_filter(language_model, config.languages)
        return [StyleFilter(language, LANGUAGE_STYLES, "language"), *chosen]
    return chosen
