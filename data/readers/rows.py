"""Convert rows of other people's files one by one: a row that cannot be used is set aside and ends nothing.

A reader yields records. `{"malformed": reason, "raw": str}` stands for a row that cannot be used, and `{"excluded":
reason, "raw": str}` for one that is left out on purpose, for example because of its label. Reasons are words that many
rows share: they are counted.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

MALFORMED_FIELDS = {"malformed", "raw"}
"""Fields of a record that stands for a row that cannot be used."""
MAX_INTEGER_DIGITS = 4300
"""Digits of the longest integer that Python reads from text. A longer one in a column of JSON stays text."""
MAX_NAME_CHARS = 40
"""Largest number of characters of a name of the file (a role, a kind of content) in a reason."""


class MalformedRow(ValueError):
    """A row that cannot be used. The message is the reason."""


class ExcludedRow(ValueError):
    """A row that is left out on purpose. The message is the reason."""


def convert_rows(rows: Iterable[Any], convert: Callable[[dict], dict]) -> Iterator[dict]:
    """Yield the record of every row, or what stands for a row that cannot be used.

    An exception that `convert` does not raise on purpose also sets aside its row only: a form that nobody foresaw must
    not end a step of days. It is counted and limited like every other reason.

    Args:
        convert: function that returns the record of one row. It raises MalformedRow or ExcludedRow.
    """
    for row in rows:
        if is_malformed(row):
            yield row
            continue
        try:
            if not isinstance(row, dict):
                raise MalformedRow(f"row is {describe_type(row)}, not an object")
            record = convert(row)
        except ExcludedRow as error:
            record = {"excluded": str(error), "raw": dump_row(row)}
        except MalformedRow as error:
            record = make_malformed(error, dump_row(row))
        except Exception as error:
            record = make_malformed(f"unforeseen form ({type(error).__name__})", dump_row(row))
        yield record


def is_malformed(row: Any) -> bool:
    """Return whether a row is the record that stands for one that cannot be used."""
    return isinstance(row, dict) and row.keys() == MALFORMED_FIELDS


def make_malformed(reason: str | MalformedRow, raw: str) -> dict:
    """Return the record that stands for a row that cannot be used."""
    return {"malformed": str(reason), "raw": raw}


def dump_row(row: Any) -> str:
    """Return a row as text for the samples: JSON where that is possible, and Python's form otherwise."""
    try:
        return json.dumps(row, default=str)
    except (TypeError, ValueError, RecursionError):  # a key that is no string, a cycle, too deep
        return str(type(row))


def parse_json(text: str) -> Any:
    """Return the value that a text in JSON states, or the marker of a malformed row."""
    try:
        return json.loads(text, parse_int=_parse_integer)
    except json.JSONDecodeError as error:
        return make_malformed(f"json: {error.msg}", text)
    except RecursionError:
        return make_malformed("json: nested too deeply", text)


def _parse_integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_INTEGER_DIGITS else digits


def describe_type(value: object) -> str:
    """Return the name of a value's type for a reason; JSON's null is "null"."""
    return "null" if value is None else type(value).__name__


def quote_name(name: object) -> str:
    """Return a name out of a file for a reason, quoted and cut to MAX_NAME_CHARS."""
    return repr(str(name)[:MAX_NAME_CHARS])
