"""Reads the bodies of requests: what can be computed, or a refusal that names the field.

Fields are those of OpenAI's interface. A field that would change the answer, and that this server does not know, is
refused: to leave it out silently would give another answer than the one that was asked for.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eval.serve.errors import RequestRefused

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Role in a request -> role that the chat template gets."""
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change no answer here."""
FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False, None), "top_logprobs": (0, None), "presence_penalty": (0, None),
    "frequency_penalty": (0, None), "logit_bias": ({}, None), "response_format": ({"type": "text"}, None),
    "echo": (False, None), "suffix": ("", None), "modalities": (["text"], None),
}  # fmt: skip
"""Fields that take one meaning alone, and the values that have it."""
MAX_STOPS, MAX_STOP_CHARS = 4, 256


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of probability that the likeliest tokens must have together; the others are not drawn."""
    seed: int | None = None
    max_tokens: int | None = None
    """Most tokens of the answer; None takes what the context has room for."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""


@dataclass(frozen=True)
class Request:
    """A request for one answer."""

    sampling: Sampling
    stream: bool
    include_usage: bool
    """Whether a stream ends with the numbers of tokens."""
    prompt: str | None = None
    """Text to continue, where there are no messages."""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def is_chat(self) -> bool:
        """Return whether the answer is the next message of a conversation."""
        return self.prompt is None


def read_chat(body: Any, model: str) -> Request:
    """Read the body of /v1/chat/completions.

    Raises:
        RequestRefused: a field is missing, has a value that cannot be, or is not known.
    """
    fields = _Fields(body, model)
    messages = fields.take("messages", list, [])
    if not messages:
        raise RequestRefused("messages: give a list with at least one message", "messages")
    tools = fields.take("tools", list, [])
    choice = fields.take("tool_choice", object, "auto")
    if choice not in ("auto", "none"):
        raise RequestRefused(f"tool_choice is {choice!r}: this server takes 'auto' or 'none'", "tool_choice")
    read_tools = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    return fields.finish(
        messages=tuple(_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)),
        tools=read_tools if choice == "auto" else (),
    )


def read_completion(body: Any, model: str) -> Request:
    """Read the body of /v1/completions; raise RequestRefused as `read_chat`."""
    fields = _Fields(body, model)
    prompt = fields.take("prompt", object, None)
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise RequestRefused("prompt: give one text", "prompt")
    _check_text(prompt, "prompt")
    return fields.finish(prompt=prompt)


class _Fields:
    """The fields of a body, taken one by one, so that what is left over is known."""

    def __init__(self, body: Any, model: str):
        if not isinstance(body, dict):
            raise RequestRefused("the body is no JSON object")
        self._left = {key: value for key, value in body.items() if key not in IGNORED}
        asked = self.take("model", str, model)
        if asked != model:
            raise RequestRefused(f"model {asked!r}: this server has {model!r}", "model", "model_not_found", 404)

    def take(self, name: str, kind: type, default: Any) -> Any:
        """Return a field, or the default where it is absent or null."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise RequestRefused(f"{name} is {_show(value)}: expected {_name(kind)}", name)
        return value

    def take_number(self, name: str, default: Any, is_right: Callable[[Any], bool], rule: str) -> Any:
        """Return a number for which a rule holds."""
        value = self.take(name, object, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_right(value):
            raise RequestRefused(f"{name} is {_show(value)}: give {rule}", name)
        return value

    def finish(self, **content: Any) -> Request:
        """Return the request of this content and of the fields that all requests have."""
        sampling = self._take_sampling()
        stream = self.take("stream", bool, False)
        options = self.take("stream_options", dict, {})
        for name, allowed in FIXED.items():
            if name in self._left and (value := self._left.pop(name)) not in allowed:
                raise RequestRefused(f"{name} is {_show(value)}: this server takes {_show(allowed[0])} alone", name)
        if self._left:
            name = sorted(self._left)[0]
            raise RequestRefused(f"{_show(name)}: this server does not know the field; leave it out", name)
        return Request(sampling, stream, options.get("include_usage") is True, **content)

    def _take_sampling(self) -> Sampling:
        newer, older = (
            self.take_number(name, None, lambda x: isinstance(x, int) and x >= 1, "a whole number from 1")
            for name in ("max_completion_tokens", "max_tokens")
        )
        stop = self.take("stop", object, [])
        stops = [stop] if isinstance(stop, str) else stop
        if not (
            isinstance(stops, list)
            and len(stops) <= MAX_STOPS
            and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS for text in stops)
        ):
            rule = f"a text, or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} characters"
            raise RequestRefused(f"stop is {_show(stop)}: give {rule}", "stop")
        seeds = range(-(1 << 63), 1 << 63)
        return Sampling(
            temperature=self.take_number("temperature", 1.0, lambda x: 0 <= x <= 2, "a number of 0 to 2"),
            top_p=self.take_number("top_p", 1.0, lambda x: 0 < x <= 1, "a number above 0, at most 1"),
            seed=self.take_number("seed", None, lambda x: isinstance(x, int) and x in seeds, "a whole number"),
            max_tokens=older if newer is None else newer,
            stop=tuple(stops),
        )


def _read_message(message: Any, name: str) -> dict[str, Any]:
    """Return a message as chat templates take it: the content is text, arguments of calls are objects."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise RequestRefused(f"{name}: give an object with a role of {', '.join(ROLES)}", name)
    read: dict[str, Any] = {
        "role": ROLES[role],
        "content": _read_content(message.get("content"), f"{name}.content"),
    }
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RequestRefused(f"{name}.tool_calls: give a list", f"{name}.tool_calls")
    if calls:
        read["tool_calls"] = [_read_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    elif message.get("content") is None:
        raise RequestRefused(f"{name}.content: give a text", f"{name}.content")
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            read[key] = message[key]
    return read


def _read_content(content: Any, name: str) -> str:
    """Return a content as text: a text, or OpenAI's list of parts."""
    parts = [{"type": "text", "text": content or ""}] if content is None or isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestRefused(f"{name} is {_show(content)}: give a text", name)
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RequestRefused(f"{name} has {_show(part)}: this model reads text alone", name)
        _check_text(part["text"], name)
    return "".join(part["text"] for part in parts)


def _read_call(call: Any, name: str) -> dict[str, Any]:
    """Return an earlier call of a tool; a request has its arguments as JSON text, templates take an object."""
    try:
        arguments = json.loads(call["function"]["arguments"])
        function = {"name": call["function"]["name"], "arguments": arguments}
        if not (isinstance(function["name"], str) and isinstance(arguments, dict)):
            raise TypeError
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise RequestRefused(
            f"{name}: give a function with a name, and its arguments as a JSON object", name
        ) from error
    return {"type": "function", "function": function} | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _read_tool(tool: Any, name: str) -> dict[str, Any]:
    """Return a tool as it came, after a check of what templates and answers need of it."""
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not (isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]):
        raise RequestRefused(f'{name}: give {{"type": "function", "function": {{"name": ...}}}}', name)
    return dict(tool)


def _check_text(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestRefused(
            f"{name} has half of a character (a surrogate) at {error.start}; remove it", name
        ) from error


def _name(kind: type) -> str:
    return {str: "a text", bool: "true or false", list: "a list", dict: "an object"}[kind]


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
