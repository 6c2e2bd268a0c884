"""Make text that is not ours harmless on a terminal: names of files, rows of corpora, messages of other programs."""

import re

_CONTROL = r"\x00-\x08\x0b-\x1f\x7f-\x9f"
_NOT_CHARACTERS = r"\ud800-\udfff"
_DIRECTION = r"\u202a-\u202e\u2066-\u2069"
_LINE_ENDS = r"\u2028\u2029"
_UNPRINTABLE = re.compile(f"[{_CONTROL}{_NOT_CHARACTERS}{_DIRECTION}{_LINE_ENDS}]")


def make_printable(text: str) -> str:
    r"""Return the text with the characters that act instead of being shown written as escapes, `\x1b` for ESC.

    These are control characters except line feed and tab, overrides of the writing direction, other line ends, and the
    surrogates by which Python spells a byte of a file name that is no UTF-8.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def make_line(text: str) -> str:
    r"""Return the text as `make_printable` does, in one line: a line feed is written as `\n` too."""
    return make_printable(text).replace("\n", "\\n")
