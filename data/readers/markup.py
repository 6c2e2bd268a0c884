"""Removal of markup from text in linear time, also where openings are never closed or nest a hundred thousand deep.

As one regular expression, `opening.*?closing` searches the rest of the text again for every opening without a closing,
and removing nested parts from the inside out takes a pass for every level.
"""

import re

_BRACES = re.compile(r"[{}]|[^{}]+")
_TABLE_MARKS = re.compile(r"[{|}]|[^{|}]+")


def replace_enclosed(text: str, opening: re.Pattern, closings: dict[str, re.Pattern]) -> str:
    """Replace every part of a text from an opening to the first closing of its kind after it.

    An opening without a closing stays.

    Args:
        opening: pattern with a group `kind`, whose text in lower case is a key of `closings`. Where the group took no
            part in a match, the match is complete without a closing. A part is replaced by the group `kept` of its
            opening, or by nothing.
        closings: kind -> pattern.
    """
    done: list[str] = []
    absent: set[str] = set()
    copied = at = 0
    while match := opening.search(text, at):
        kind = (match["kind"] or "").lower()
        # What is not found once is not behind any later opening either.
        closing = None if kind in absent else closings[kind].search(text, match.end()) if kind else match
        if closing is None:
            absent.add(kind)
            at = match.start() + 1
            continue
        kept = match["kept"] if "kept" in opening.groupindex else ""
        done += [text[copied : match.start()], kept]
        copied = at = closing.end()
    return "".join([*done, text[copied:]])


def remove_templates(text: str) -> str:
    """Remove MediaWiki's templates `{{...}}`, the inner ones first; a part with single or unpaired braces stays."""
    parts: list[str] = []
    braces: list[int] = []
    """Positions of the braces in `parts`."""
    for part in _BRACES.findall(text):
        if part == "}" and len(braces) > 2 and parts[-1] == "}":
            outer, inner = braces[-3:-1]
            if inner == outer + 1 and parts[inner] == parts[outer] == "{":
                del parts[outer:], braces[-3:]
                continue
        if part in "{}":
            braces.append(len(parts))
        parts.append(part)
    return "".join(parts)


def remove_tables(text: str) -> str:
    """Remove MediaWiki's tables `{|...|}`, the inner ones first; an opening or closing without its partner stays."""
    parts: list[str] = []
    openings: list[int] = []
    """Positions in `parts` of the braces that open a table."""
    for part in _TABLE_MARKS.findall(text):
        if part == "}" and openings and parts[-1] == "|" and len(parts) > openings[-1] + 2:
            del parts[openings.pop() :]
            continue
        if part == "|" and parts and parts[-1] == "{":
            openings.append(len(parts) - 1)
        parts.append(part)
    return "".join(parts)
