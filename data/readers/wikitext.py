"""Conversion of MediaWiki dumps to prose: the running text of articles without their markup."""

import html
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

DROPPED_SECTIONS = {
    "see also", "references", "external links", "further reading", "notes", "bibliography", "footnotes", "sources",
    "gallery", "notes and references", "citations", "works", "discography", "filmography",
}  # fmt: skip
"""Headings, in lower case, of sections that hold lists instead of prose."""
MIN_LINE_WORDS = 6
"""Least number of words of a line that is kept: shorter ones are captions, labels and list items."""

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r"<ref[^>/]*/>|<ref[^>]*>.*?</ref>", re.DOTALL | re.IGNORECASE)
_BLOCK = re.compile(
    r"<(math|gallery|timeline|source|syntaxhighlight|code|pre|nowiki)\b[^>]*>.*?</\1>", re.DOTALL | re.I
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_FILE = re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[https?://\S+\s*([^\]]*)\]")
_TAG = re.compile(r"<[^>]{1,200}>")
_QUOTES = re.compile(r"'{2,}")
_SECTION = re.compile(r"^==([^=].*?)==\s*$", re.MULTILINE)
_HEADING = re.compile(r"^=+.*=+\s*$", re.MULTILINE)


def _remove_nested(pattern: re.Pattern, text: str) -> str:
    """Remove matches until none is left; the pattern matches the innermost ones, as templates and tables nest."""
    while True:
        shorter = pattern.sub("", text)
        if shorter == text:
            return text
        text = shorter


def extract_prose(wikitext: str) -> str:
    """Return the lines of prose, without markup, templates, tables, references and headings."""
    text = _COMMENT.sub("", wikitext)
    text = _REFERENCE.sub("", text)
    text = _BLOCK.sub("", text)
    text = _remove_nested(_TEMPLATE, text)
    text = _remove_nested(_TABLE, text)
    text = _FILE.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _HEADING.sub("", text)
    text = _TAG.sub("", _QUOTES.sub("", text))
    lines = (" ".join(line.lstrip("*#:; ").split()) for line in html.unescape(text).splitlines())
    return "\n".join(
        line for line in lines if len(line.split()) >= MIN_LINE_WORDS and not line.startswith(("|", "!", "{"))
    )


def split_sections(title: str, wikitext: str) -> Iterator[str]:
    """Yield the lead and each top-level section of one article as a document, headed by the article's title."""
    parts = _SECTION.split(wikitext)
    headings = ["", *(heading.strip() for heading in parts[1::2])]
    for heading, body in zip(headings, parts[::2], strict=True):
        prose = extract_prose(body)
        if prose and heading.lower() not in DROPPED_SECTIONS:
            yield f"{title}: {heading}\n{prose}" if heading else f"{title}\n{prose}"


def read_articles(xml: bytes) -> Iterator[str]:
    """Yield the sections of a MediaWiki XML export's encyclopedia pages (namespace 0), leaving out redirects."""
    for _, element in ElementTree.iterparse(io.BytesIO(xml)):
        if element.tag.rpartition("}")[2] != "page":
            continue
        # `{*}` matches any namespace: its version differs from dump to dump.
        wikitext = element.findtext(".//{*}text") or ""
        if element.findtext("{*}ns") == "0" and not wikitext.lstrip().upper().startswith("#REDIRECT"):
            yield from split_sections(element.findtext("{*}title") or "", wikitext)
        # Frees the page: a dump does not fit into memory as a tree.
        element.clear()
