"""Keeps what users wrote apart from what a chat template writes, where both spell special tokens.

A spelling inside of a message is broken by a mark, a character that occurs nowhere else in the conversation. The
template renders the marked messages. So the special tokens that the rendered text still holds are the template's; the
text between them loses its marks and is encoded as text. A tokenizer is a `Tokenizer` of the tokenizers library, which
is not imported for it, as in `core.literal_text`.
"""

import json
import re
from typing import Any
from urllib.parse import quote

from core.literal_text import copy_literal_tokenizer, list_control_tokens

NO_MARK = "holds every character that could mark where it spells a special token"
MARKS = tuple(map(chr, range(0xE000, 0xF8FF)))
"""Candidates for the mark, of Unicode's private use area: no letters, no white space, the same in upper case."""


class UnusableConversationError(Exception):
    """A conversation cannot be trained on; the message is a reason that many conversations may share."""


def mark_messages(messages: list[dict], spelling: re.Pattern[str]) -> tuple[list[dict], str]:
    """Break every spelling of a control token in messages by a mark behind its first character.

    The messages' roles stay as they are, because templates compare them.

    Args:
        spelling: `core.literal_text.compile_spelling_pattern` of the tokenizer.

    Returns:
        the messages and the mark; the messages themselves and "" where none of them spells a control token.

    Raises:
        UnusableConversationError: no character is left to be the mark.
    """
    if not any(_spells({**message, "role": ""}, spelling) for message in messages):
        return messages, ""
    written = json.dumps(messages, ensure_ascii=False)
    mark = next((mark for mark in MARKS if mark not in written and not holds_escaped_mark(written, mark)), None)
    if mark is None:
        raise UnusableConversationError(NO_MARK)

    def mark_value(value: Any) -> Any:
        if isinstance(value, str):
            return spelling.sub(lambda first: first[0] + mark, value)
        if isinstance(value, list):
            return [mark_value(item) for item in value]
        if isinstance(value, dict):
            return {mark_value(key): mark_value(item) for key, item in value.items()}
        return value

    roles = [{"role": message["role"]} if "role" in message else {} for message in messages]
    return [mark_value(message) | role for message, role in zip(messages, roles, strict=True)], mark


def holds_escaped_mark(rendered: str, mark: str) -> bool:
    """Return whether a text holds the mark in a form in which it cannot be taken out: JSON in ASCII, or a URL's."""
    return bool(mark) and any(form in rendered.lower() for form in (f"\\u{ord(mark):04x}", quote(mark).lower()))


def _spells(value: Any, spelling: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return spelling.search(value) is not None
    if isinstance(value, dict):
        return any(_spells(key, spelling) or _spells(item, spelling) for key, item in value.items())
    return isinstance(value, list) and any(_spells(item, spelling) for item in value)


class MarkedTextEncoder:
    """Encodes rendered text: the control tokens in it as they are, everything else as text, without its marks.

    For a text without marks the ids are those of the tokenizer itself.
    """

    def __init__(self, tokenizer: Any):
        self.literal = copy_literal_tokenizer(tokenizer)
        self.control = list_control_tokens(tokenizer)
        self._control_ids = set(self.control.values())
        self._finder = _make_finder(tokenizer)

    def encode(self, rendered: str, mark: str) -> list[int]:
        """Return the ids of a rendered text, without bos or eos."""
        ids: list[int] = []
        end = 0
        found = self._finder.encode(rendered, add_special_tokens=False)
        for index, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if index in self._control_ids:
                ids += [*self._encode_text(rendered[end:start], mark), index]
                end = stop
        return ids + self._encode_text(rendered[end:], mark)

    def _encode_text(self, text: str, mark: str) -> list[int]:
        return self.literal.encode(text.replace(mark, ""), add_special_tokens=False).ids if text else []


def _make_finder(tokenizer: Any) -> Any:
    """Return a tokenizer that encodes the added tokens alone, with their offsets, and drops all other text.

    It finds them by the tokenizer's own rules (lstrip, rstrip, single_word, the longest of several).
    """
    added = tokenizer.get_added_tokens_decoder()
    state = json.loads(tokenizer.to_str())
    vocabulary = {token.content: index for index, token in added.items()}
    state["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    state |= {"added_tokens": [], "pre_tokenizer": None, "post_processor": None, "decoder": None}
    state |= {"truncation": None, "padding": None}
    finder = type(tokenizer).from_str(json.dumps(state))
    finder.add_tokens(list(added.values()))
    return finder
