"""Read the calls of functions in the several forms that public corpora have, and write them in one."""

import json
from typing import Any

from data.readers.rows import MalformedRow, describe_type, parse_json

ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Names of a call's arguments: OpenAI's, Llama's, LangChain's and Anthropic's."""
NO_ARGUMENTS = {"name", "id", "type", "index"}
"""Fields that a call without arguments may have."""


def read_calls(calls: Any) -> list[dict]:
    """Return the calls of a message as [{"name": str, "arguments": object}].

    Read are a list of calls or a single one, each an object or JSON text, in OpenAI's form ({"type", "function":
    {"name", "arguments"}}) or flat ({"name", "arguments"}). Arguments may be an object or JSON text too.

    Raises:
        MalformedRow: it is no call.
    """
    calls = _read_text(calls, "tool calls are")
    if not calls:
        return []
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise MalformedRow(f"tool calls are {describe_type(calls)}, not a list")
    return [_read_call(call) for call in calls]


def _read_call(call: Any) -> dict:
    call = _read_text(call, "tool call is")
    if isinstance(call, dict) and call.get("function") is not None:
        call = _read_text(call["function"], "function of a tool call is")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise MalformedRow("tool call without a name")
    if call.keys().isdisjoint(ARGUMENTS) and not call.keys() <= NO_ARGUMENTS:
        raise MalformedRow("tool call with unknown fields and no arguments")
    stated = [call[name] for name in ARGUMENTS if call.get(name) is not None]
    arguments = _read_text(stated[0], "arguments of a tool call are") if stated else {}
    if arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise MalformedRow(f"arguments of a tool call are {describe_type(arguments)}, not an object")
    return {"name": call["name"], "arguments": arguments}


def _read_text(value: Any, what: str) -> Any:
    """Return what a text in JSON states. What is no text stays as it is, and so does an empty one."""
    if not isinstance(value, str) or not value.strip():
        return value.strip() if isinstance(value, str) else value
    parsed = parse_json(value)
    if isinstance(parsed, dict) and "malformed" in parsed:
        raise MalformedRow(f"{what} text that is no JSON")
    return parsed


def dump_json(value: Any) -> str:
    """Return a value as JSON text, with letters of every script as they are.

    Raises:
        MalformedRow: JSON has no form for it: a time, bytes, NaN.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise MalformedRow("tool call with a value that JSON does not have") from error


def dump_tools(tools: Any, column: str) -> str:
    """Return the functions that a conversation may call as JSON text: as the row has it, or made from objects.

    Raises:
        MalformedRow: there are none.
    """
    if isinstance(tools, str) and tools.strip():
        return tools
    if isinstance(tools, list | dict) and tools:
        return dump_json(tools)
    raise MalformedRow(f"no functions in `{column}`")
