"""Decode text files of other people: byte order marks are obeyed, and only a line feed ends a line."""

import codecs

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    # The mark of UTF-16 (little-endian) is the beginning of that of UTF-32, so UTF-32 comes first.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Pairs of a byte order mark and the encoding that it announces."""


def detect_encoding(beginning: bytes) -> str:
    """Return the encoding that the byte order mark at the beginning of a file announces, UTF-8 where it has none.

    Args:
        beginning: at least the first four bytes of the file, or all of it.
    """
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS if beginning.startswith(mark)), "utf-8")


def decode_text(content: bytes) -> str:
    """Return the text of a file, without its byte order mark.

    Raises:
        UnicodeDecodeError: the file is not in the encoding that its mark announces, or without one not in UTF-8.
    """
    return content.decode(detect_encoding(content)).removeprefix("\ufeff")


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text without their ends, `\n` or `\r\n`.

    `str.splitlines` would also split at characters that JSON strings and prose contain (U+2028, U+0085, \x0b, ...).
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
