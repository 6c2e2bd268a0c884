"""Convert the conversations of public instruction corpora to `[{"role", "content"}, ...]`.

Their messages are {role, content} (OpenAI) or {from, value} (ShareGPT), with content as text or in parts, and with
calls of functions in the forms that `read_calls` reads. What has no place in a text conversation is refused by name.
"""

from collections.abc import Sequence
from typing import Any

from data.readers.rows import MalformedRow, describe_type, parse_json, quote_name
from data.readers.tool_calls import dump_json, read_calls

ROLES = ("system", "user", "assistant", "tool")
ROLES_BY_SPEAKER = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant",
    "chatbot": "assistant", "model": "assistant", "ai": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "function": "tool", "ipython": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
"""Names of the speakers in public corpora -> roles: OpenAI's, ShareGPT's, Llama's, Gemma's and LLaMA-Factory's.

They are compared in lower case, with `_` for a space or hyphen.
"""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Kinds of content parts that hold text."""
TOOLS_PROMPT = "You may call these functions:"
"""Beginning of the system message that lists the functions a conversation may call."""


def make_message(role: str | None, content: str | None) -> dict:
    """Return one message of a conversation. The pipeline rejects a record whose role or content is None."""
    return {"role": role, "content": content}


def make_exchange(question: str | None, answer: str | None) -> dict:
    """Return a conversation of one question and one answer."""
    return {"messages": [make_message("user", question), make_message("assistant", answer)]}


def convert_messages(messages: Any, column: str) -> list[dict]:
    """Return the messages of a row as roles and texts, up to the last one of the assistant.

    Only answers are trained, so nothing is lost with what follows the last answer. A system message without text says
    nothing and is left out.

    Args:
        messages: value of the column: a list of messages, the same as JSON text, or a struct of lists, as which older
            versions of `datasets` store a sequence of structs.

    Raises:
        MalformedRow: a message cannot be read, or has content that is no text.
    """
    converted = [convert_message(message) for message in _list_messages(messages, column)]
    kept = [message for message in converted if message["role"] != "system" or (message["content"] or "").strip()]
    answers = [index for index, message in enumerate(kept) if message["role"] == "assistant"]
    return kept[: answers[-1] + 1] if answers else kept


def _list_messages(messages: Any, column: str) -> Sequence[Any]:
    if isinstance(messages, str):
        messages = parse_json(messages)
    if isinstance(messages, dict) and messages and all(isinstance(part, list) for part in messages.values()):
        lengths = {len(part) for part in messages.values()}
        if len(lengths) == 1:
            return [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list):
        raise MalformedRow(f"no list in `{column}`")
    return messages


def convert_message(message: Any) -> dict:
    """Return a message as {role, content}, with the functions that it calls appended to its content as JSON.

    Raises:
        MalformedRow: it is no message, its role is unknown, or its content is no text.
    """
    if not isinstance(message, dict):
        raise MalformedRow(f"message is {describe_type(message)}, not an object")
    role = read_role(message.get("role") if message.get("role") is not None else message.get("from"))
    content = join_content(message["content"] if "content" in message else message.get("value"))
    calls = read_calls(message.get("tool_calls")) or read_calls(message.get("function_call"))
    if calls:
        text = dump_json(calls)
        content = f"{content}\n{text}" if content else text
    return make_message(role, content)


def read_role(speaker: Any) -> str:
    """Return the role of a speaker.

    Raises:
        MalformedRow: no corpus that we know has this speaker; names it.
    """
    if not isinstance(speaker, str):
        raise MalformedRow(f"role is {describe_type(speaker)}, not a string")
    role = ROLES_BY_SPEAKER.get(speaker.strip().lower().replace(" ", "_").replace("-", "_"))
    if role is None:
        raise MalformedRow(f"unknown role {quote_name(speaker)}")
    return role


def join_content(content: Any) -> str | None:
    """Return the text of a content, which may be given in parts.

    Parts are joined as chat templates print them, with nothing in between. A null content is None: a message that only
    calls functions has it.

    Raises:
        MalformedRow: it is neither text nor parts of text; names the kind of the part.
    """
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise MalformedRow(f"content is {describe_type(content)}, not text")
    return "".join(map(_read_part, content))


def _read_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise MalformedRow(f"content part is {describe_type(part)}, not text")
    kind = part.get("type", "text" if isinstance(part.get("text"), str) else None)
    if kind not in TEXT_PARTS:
        raise MalformedRow(f"content part of kind {quote_name(kind)}")
    if not isinstance(part.get("text"), str):
        raise MalformedRow(f"text of a content part is {describe_type(part.get('text'))}, not a string")
    return part["text"]
