"""Quality filters, by what kind of writing a document is.

Web prose gets FineWeb's sequence (arXiv 2406.17557): Gopher repetition, Gopher quality, C4 without its line-punctuation
rule, FineWeb's own three rules. An encyclopedia gets Gopher's alone: the rules about lines judge a page's layout, which
a dump has lost. Documentation keeps the rules that formulas and examples do not break by their nature.
Code and conversations pass: these heuristics are about prose.
"""

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.corpora import Style


class StyleFilter(BaseFilter):
    """Applies a datatrove filter to documents of one style and passes the others."""

    def __init__(self, inner: BaseFilter, style: Style, label: str):
        # datatrove names a block's statistics when it is initialised.
        self.name = label
        super().__init__()
        self.inner = inner
        self.style = style

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.inner.filter(doc) if doc.metadata["style"] == self.style else True


def quality_filters() -> list[StyleFilter]:
    """The blocks, in order. Their labels are the keys of `filters` in the manifest."""
    # Examples repeat names and prompts (">>>"); the limits on symbols and letters would drop every page with formulas.
    documentation_quality = GopherQualityFilter(
        min_avg_word_length=2, max_symbol_word_ratio=None, max_non_alpha_words_ratio=0.4
    )
    return [
        StyleFilter(GopherRepetitionFilter(), "prose", "gopher_repetition"),
        StyleFilter(GopherQualityFilter(), "prose", "gopher_quality"),
        StyleFilter(C4QualityFilter(filter_no_terminal_punct=False), "prose", "c4_quality"),
        StyleFilter(FineWebQualityFilter(), "prose", "fineweb_quality"),
        StyleFilter(GopherRepetitionFilter(), "encyclopedia", "encyclopedia_repetition"),
        StyleFilter(GopherQualityFilter(), "encyclopedia", "encyclopedia_quality"),
        StyleFilter(documentation_quality, "documentation", "documentation_quality"),
    ]
