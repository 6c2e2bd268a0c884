"""Bounds runs of combining marks, which Python brings into their canonical order in quadratic time."""

import re
import sys
import unicodedata

LONGEST_RUN = 30
"""Largest number of marks in a row, that of Unicode's Stream-Safe Text Format (UAX #15, section 13)."""
_MARKS = frozenset(char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(char))
_RUN = re.compile(f"[{''.join(sorted(_MARKS))}]{{{LONGEST_RUN + 1},}}")


def remove_mark_runs(text: str) -> str:
    """Return the text without its runs of more than LONGEST_RUN combining marks.

    Call it before `datatrove.utils.text.simplify_text`, which normalises to NFD and removes accents anyway. No writing
    puts so many marks on a letter.
    """
    # Most texts have no mark at all, which the set decides in a fraction of the pattern's time.
    return text if text.isascii() or _MARKS.isdisjoint(text) else _RUN.sub("", text)
