"""Readers of the rows of remote files (data/readers/remote_files.py) as documents and conversations.

A reader takes the columns that its corpus names (`RemoteFiles.columns`), in the order that its docstring states.
"""

import json
from collections.abc import Iterator
from typing import Any

from data.catalogue.corpus import Unit
from data.readers.instruction_readers import ROLES_BY_SPEAKER, TOOLS_PROMPT, make_exchange, make_message
from data.readers.remote_files import get_source, read_rows


def read_text(unit: Unit) -> Iterator[dict]:
    """Yield documents. Columns: the text."""
    (text,) = get_source(unit).columns
    for row in read_rows(unit):
        yield row if "malformed" in row else {"text": row.get(text)}


def read_pairs(unit: Unit) -> Iterator[dict]:
    """Yield conversations of one question and one answer. Columns: question, answer."""
    question, answer = get_source(unit).columns
    for row in read_rows(unit):
        yield row if "malformed" in row else make_exchange(row.get(question), row.get(answer))


def read_unharmful_pairs(unit: Unit) -> Iterator[dict]:
    """Yield pairs whose answer is labelled unharmful, and reject the others. Columns: question, answer, label."""
    question, answer, label = get_source(unit).columns
    for row in read_rows(unit):
        if "malformed" in row:
            yield row
        elif row.get(label) != "unharmful":
            yield {"malformed": f"{label} is {row.get(label)!r}, not 'unharmful'", "raw": json.dumps(row)}
        else:
            yield make_exchange(row.get(question), row.get(answer))


def read_messages(unit: Unit) -> Iterator[dict]:
    """Yield conversations. Columns: messages ({role, content, tool_calls} or {from, value}), and any system prompt."""
    messages, *system = get_source(unit).columns
    for row in read_rows(unit, optional=system):
        if "malformed" in row or not isinstance(row.get(messages), list):
            yield row if "malformed" in row else {"malformed": f"no list in `{messages}`", "raw": json.dumps(row)}
            continue
        before = [make_message("system", row[name]) for name in system if row.get(name)]
        yield {"messages": [*before, *map(_convert_message, row[messages])]}


def read_prompted(unit: Unit) -> Iterator[dict]:
    """Yield conversations of given messages and the assistant's answer to them. Columns: messages, answer."""
    messages, answer = get_source(unit).columns
    for row in read_rows(unit):
        if "malformed" in row or not isinstance(row.get(messages), list):
            yield row if "malformed" in row else {"malformed": f"no list in `{messages}`", "raw": json.dumps(row)}
        else:
            yield {"messages": [*map(_convert_message, row[messages]), make_message("assistant", row.get(answer))]}


def read_function_calls(unit: Unit) -> Iterator[dict]:
    """Yield requests answered by calls. Columns: request, tools, calls; the last two are JSON in a string."""
    request, tools, calls = get_source(unit).columns
    for row in read_rows(unit):
        if "malformed" in row:
            yield row
            continue
        conversation = make_exchange(row.get(request), row.get(calls))["messages"]
        yield {"messages": [make_message("system", f"{TOOLS_PROMPT}\n{row.get(tools)}"), *conversation]}


def _convert_message(message: dict) -> dict:
    """Return a message as {role, content}, with the functions that it calls appended to its content as JSON."""
    role: Any = message.get("role") or message.get("from")
    content = message.get("content") if "content" in message else message.get("value")
    if message.get("tool_calls"):
        calls = json.dumps([call["function"] for call in message["tool_calls"]])
        content = f"{content}\n{calls}" if content else calls
    # A role that has its usual name already stays as it is.
    return make_message(ROLES_BY_SPEAKER.get(role, role), content)
