"""Builds the objects of OpenAI's interface: whole answers, and the chunks of a stream."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from eval.serve.generation import FinishReason


@dataclass
class Replies:
    """Makes the objects of one answer, which share an id and a time."""

    model: str
    is_chat: bool
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        self._id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def make_whole(
        self, text: str, calls: list[tuple[str, str]], reason: FinishReason, usage: dict[str, int]
    ) -> dict[str, Any]:
        """Return a whole answer."""
        content: dict[str, Any] = {"text": text, "logprobs": None}
        if self.is_chat:
            message = {"role": "assistant", "content": None if calls else text}
            content = {"message": message | ({"tool_calls": list_calls(calls)} if calls else {}), "logprobs": None}
        choice = {"index": 0, **content, "finish_reason": reason}
        return self._wrap("chat.completion" if self.is_chat else "text_completion", [choice]) | {"usage": usage}

    def make_chunk(self, delta: dict[str, Any] | str, reason: FinishReason | None = None) -> dict[str, Any]:
        """Return one chunk of a stream: a text, or for a chat what is added to the message."""
        content: dict[str, Any] = {"text": delta}
        if self.is_chat:
            content = {"delta": {"content": delta} if isinstance(delta, str) and delta else delta or {}}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return self._wrap(self._chunk_kind, [choice])

    def make_usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked to count its tokens."""
        return self._wrap(self._chunk_kind, []) | {"usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def list_calls(calls: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return calls of tools, (name, arguments as JSON), as a message has them."""
    return [
        {
            "index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for index, (name, arguments) in enumerate(calls)
    ]  # fmt: skip


def count_usage(n_prompt: int, n_answer: int) -> dict[str, int]:
    """Return the numbers of tokens in the interface's words."""
    return {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}
