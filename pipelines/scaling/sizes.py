"""Read sizes and counts as people write them: 3GB, 900M, 6T."""

import re

from core.errors import RefusedInput

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
"""Suffix of a number -> its factor. Both G and B are a billion."""
_NUMBER = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgbtpe]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str, option: str) -> float:
    """Return the number that a text states: 3GB, 1.5GiB, 500B (billion), 6T, 5e8.

    Raises:
        RefusedInput: it is no positive number with one of the suffixes; names the option.
    """
    found = _NUMBER.fullmatch(text.strip())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if not found or number <= 0 or (found[3] and not found[2]):
        raise RefusedInput(
            f"{option} {text!r}: give a positive number, with k, M, G or B, T, or GB, GiB: 3GB, 500B, 5e8"
        )
    unit = found[2].lower()
    if found[3]:
        return number * 1024 ** ("kmgtpe".index("g" if unit == "b" else unit) + 1)
    return number * UNITS[unit]
