"""`PromptEncoder`: the token ids of a request, rendered by the model's chat template."""

from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from core.literal_text import compile_spelling_pattern
from core.marked_text import MarkedTextEncoder, UnusableConversationError, holds_escaped_mark, mark_messages
from core.template_limits import check_templates, limit_rendering
from eval.serve.errors import RequestRefused


def is_text(text: str) -> bool:
    """Return whether a text has a form in UTF-8: half of a character has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class PromptEncoder:
    """Encodes prompts. What a client spells stays text: only the chat template writes special tokens.

    Raises:
        RefusedInput: the tokenizer cannot encode the spelling of a special token as text, or its chat template could
            run for hours.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        check_templates(tokenizer.chat_template, jinja2.Environment().lex)
        self._tokenizer = tokenizer
        self._marked = MarkedTextEncoder(tokenizer.backend_tokenizer)
        self._spelling = compile_spelling_pattern(self._marked.control)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text to continue, with what the tokenizer writes before one (bos)."""
        return self._marked.literal.encode(text).ids

    def encode_chat(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the ids of a conversation, up to where the assistant's next message begins.

        Raises:
            RequestRefused: the model has no chat template, it renders no tools, or it fails on these messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestRefused(
                "the model has no chat template; use /v1/completions, or serve an instruction-tuned model", "messages"
            )
        try:
            marked, mark = mark_messages([*messages, {"tools": list(tools)}], self._spelling)
        except UnusableConversationError as error:
            raise RequestRefused(f"messages: the conversation {error}", "messages") from error
        *marked_messages, last = marked
        rendered = self._render(marked_messages, last["tools"])
        if tools and rendered == self._render(marked_messages, []):
            raise RequestRefused("tools: the model's chat template renders none; leave the field out", "tools")
        if holds_escaped_mark(rendered, mark):
            raise RequestRefused("messages: the chat template escapes what spells a special token", "messages")
        return self._marked.encode(rendered, mark)

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
        try:
            with limit_rendering():
                rendered = self._tokenizer.apply_chat_template(
                    messages, tools=[*tools] or None, tokenize=False, add_generation_prompt=True
                )
        # A template is a program: it raises what it will (TemplateError, TypeError, ...) on what it is given.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            raise RequestRefused(f"messages: the chat template fails with {reason}", "messages") from error
        assert isinstance(rendered, str), "tokenize=False gives the text"
        if not is_text(rendered):
            raise RequestRefused("messages: the chat template renders half of a character (a surrogate)", "messages")
        return rendered
