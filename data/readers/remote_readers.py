"""Readers of the rows of remote files (data/readers/remote_files.py) as documents and conversations.

A reader takes the columns that its corpus names (`RemoteFiles.columns`), in the order that its docstring states.
"""

from collections.abc import Iterator
from typing import Any

from data.catalogue.corpus import Unit
from data.readers.messages import TOOLS_PROMPT, convert_messages, join_content, make_exchange, make_message
from data.readers.remote_files import get_source, read_rows
from data.readers.rows import ExcludedRow, MalformedRow, convert_rows
from data.readers.tool_calls import dump_tools, read_calls


def read_text(unit: Unit) -> Iterator[dict]:
    """Yield documents. Columns: the text, as a string or as UTF-8 bytes."""
    (text,) = get_source(unit).columns
    yield from convert_rows(read_rows(unit), lambda row: {"text": _decode(row.get(text))})


def _decode(text: Any) -> Any:
    """Return bytes as text; the pipeline refuses what is neither."""
    try:
        return text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise MalformedRow("text is bytes that are not UTF-8") from error


def read_pairs(unit: Unit) -> Iterator[dict]:
    """Yield conversations of one question and one answer. Columns: question, answer."""
    question, answer = get_source(unit).columns
    yield from convert_rows(
        read_rows(unit),
        lambda row: make_exchange(join_content(row.get(question)), join_content(row.get(answer))),
    )


def read_unharmful_pairs(unit: Unit) -> Iterator[dict]:
    """Yield pairs whose answer is labelled unharmful, and exclude the others. Columns: question, answer, label."""
    question, answer, label = get_source(unit).columns

    def convert(row: dict) -> dict:
        if label not in row:
            raise MalformedRow(f"no `{label}`")
        if row[label] != "unharmful":
            raise ExcludedRow(f"{label} is not 'unharmful'")
        return make_exchange(join_content(row.get(question)), join_content(row.get(answer)))

    yield from convert_rows(read_rows(unit), convert)


def read_messages(unit: Unit) -> Iterator[dict]:
    """Yield conversations. Columns: messages ({role, content, tool_calls} or {from, value}), and any system prompt."""
    messages, *system = get_source(unit).columns

    def convert(row: dict) -> dict:
        before = [make_message("system", join_content(row[name])) for name in system if row.get(name)]
        return {"messages": [*before, *convert_messages(row.get(messages), messages)]}

    yield from convert_rows(read_rows(unit, optional=system), convert)


def read_released_messages(unit: Unit) -> Iterator[dict]:
    """Yield conversations, and exclude those whose prompt the publisher withholds: it is empty, or a dash.

    Columns: messages.
    """
    (messages,) = get_source(unit).columns

    def convert(row: dict) -> dict:
        converted = convert_messages(row.get(messages), messages)
        if any(turn["role"] == "user" and (turn["content"] or "").strip() in ("", "-") for turn in converted):
            raise ExcludedRow("prompt withheld by the publisher")
        return {"messages": converted}

    yield from convert_rows(read_rows(unit), convert)


def read_prompted(unit: Unit) -> Iterator[dict]:
    """Yield conversations of given messages and the assistant's answer to them. Columns: messages, answer."""
    messages, answer = get_source(unit).columns

    def convert(row: dict) -> dict:
        given = row.get(messages)
        prompt = [*given, {"role": "assistant", "content": row.get(answer)}] if isinstance(given, list) else given
        return {"messages": convert_messages(prompt, messages)}

    yield from convert_rows(read_rows(unit), convert)


def read_function_calls(unit: Unit) -> Iterator[dict]:
    """Yield requests answered by calls. Columns: request, tools, calls; the last two are JSON text or objects."""
    request, tools, calls = get_source(unit).columns

    def convert(row: dict) -> dict:
        answer = row.get(calls)
        found = read_calls(answer)
        if not found:
            raise MalformedRow(f"no calls in `{calls}`")
        system = make_message("system", f"{TOOLS_PROMPT}\n{dump_tools(row.get(tools), tools)}")
        # Calls that the row has as text stay as they are.
        exchange = make_exchange(
            join_content(row.get(request)), answer if isinstance(answer, str) else dump_tools(found, calls)
        )
        return {"messages": [system, *exchange["messages"]]}

    yield from convert_rows(read_rows(unit), convert)
