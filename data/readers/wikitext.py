"""Conversion of MediaWiki dumps to prose: the running text of articles without their markup."""

import html
import io
import re
from collections.abc import Iterator
from xml.etree import ElementTree

from data.readers.markup import remove_tables, remove_templates, replace_enclosed

DROPPED_SECTIONS = {
    "see also", "references", "external links", "further reading", "notes", "bibliography", "footnotes", "sources",
    "gallery", "notes and references", "citations", "works", "discography", "filmography",
}  # fmt: skip
"""Headings, in lower case, of sections that hold lists instead of prose."""
MIN_LINE_WORDS = 6
"""Least number of words of a line that is kept: shorter ones are captions, labels and list items."""

# The numbers in braces bound what an opening without an end may take: without them its time would be quadratic.
_COMMENT = re.compile(r"(?P<kind><!--)")
_REFERENCE = re.compile(r"<ref[^>/]{0,500}/>|<(?P<kind>ref)[^>]{0,500}>", re.IGNORECASE)
_BLOCK_NAMES = ("math", "gallery", "timeline", "source", "syntaxhighlight", "code", "pre", "nowiki")
_BLOCK = re.compile(rf"<(?P<kind>{'|'.join(_BLOCK_NAMES)})\b[^>]{{0,500}}>", re.IGNORECASE)
_CLOSINGS = {"<!--": re.compile("-->")} | {
    name: re.compile(f"</{name}>", re.IGNORECASE) for name in ("ref", *_BLOCK_NAMES)
}
_FILE = re.compile(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_EXTERNAL = re.compile(r"\[https?://[^\s\]]{1,2000}+\s{0,100}+([^\]]{0,500}+)\]")
_TAG = re.compile(r"<[^>]{1,200}>")
_QUOTES = re.compile(r"'{2,}")
_SECTION = re.compile(r"^==([^=].*?)==\s*$", re.MULTILINE)
_HEADING = re.compile(r"^=.*=\s*$", re.MULTILINE)
_LONG_NUMBER = re.compile(r"&#[xX]?[0-9a-fA-F]{10,}+;?")
"""Character references beyond Unicode. Python reads no number of more than 4,300 digits."""


def extract_prose(wikitext: str) -> str:
    """Return the lines of prose, without markup, templates, tables, references and headings."""
    text = wikitext
    for opening in (_COMMENT, _REFERENCE, _BLOCK):
        text = replace_enclosed(text, opening, _CLOSINGS)
    text = remove_tables(remove_templates(text))
    text = _FILE.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _HEADING.sub("", text)
    text = _TAG.sub("", _QUOTES.sub("", text))
    text = html.unescape(_LONG_NUMBER.sub("", text))
    lines = (" ".join(line.lstrip("*#:; ").split()) for line in text.splitlines())
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
