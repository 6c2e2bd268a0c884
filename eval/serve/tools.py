"""Finds the calls of tools in an answer."""

import json
import re
from collections.abc import Collection
from typing import Any

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def find_tool_calls(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Return (name, arguments as JSON) of the calls that an answer consists of; none if it is anything else.

    Models write a call as a JSON object with `name` and `parameters` or `arguments` (Llama 3; the special token before
    it is not part of the text), or several in a list, or each between <tool_call> tags (Qwen, Hermes).

    Args:
        names: tools of the request. An answer that calls another one is text.
    """
    texts = _TAGGED.findall(text) or [text.strip()]
    calls: list[tuple[str, str]] = []
    for part in texts:
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            return []
        for call in value if isinstance(value, list) else [value]:
            if (read := _read_call(call, names)) is None:
                return []
            calls.append(read)
    return calls


def _read_call(call: Any, names: Collection[str]) -> tuple[str, str] | None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or call["name"] not in names:
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return (call["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
