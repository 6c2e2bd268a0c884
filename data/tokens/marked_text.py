"""Keeps what users wrote apart from what a chat template writes, where both spell special tokens.

A spelling inside of a message is broken by a mark, a character that occurs nowhere else in the conversation. The
template renders the marked messages. So the special tokens that the rendered text still holds are the template's; the
text between them loses its marks and is encoded as text.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer

from core.literal_text import copy_literal_tokenizer, list_control_tokens

MARKS = tuple(map(chr, range(0xE000, 0xF8FF)))
"""Candidates for the mark, of Unicode's private use area: no letters, no white space, the same in upper case."""


def mark_messages(messages: list[dict], spelling: re.Pattern[str]) -> tuple[list[dict], str]:
    """Break every spelling of a control token in messages by a mark behind its first character.

    Roles stay as they are, because templates compare them.

    Args:
        spelling: `core.literal_text.compile_spelling_pattern` of the tokenizer.

    Returns:
        the messages and the mark; the messages themselves and "" where none of them spells a control token.
    """
    if not any(_spells(message, spelling) for message in messages):
        return messages, ""
    written = json.dumps(messages, ensure_ascii=False)
    mark = next(mark for mark in MARKS if mark not in written and _escape(mark) not in written)

    def mark_value(value: Any) -> Any:
        if isinstance(value, str):
            return spelling.sub(lambda first: first[0] + mark, value)
        if isinstance(value, list):
            return [mark_value(item) for item in value]
        if isinstance(value, dict):
            return {mark_value(key): item if key == "role" else mark_value(item) for key, item in value.items()}
        return value

    return [mark_value(message) for message in messages], mark


def holds_escaped_mark(rendered: str, mark: str) -> bool:
    """Return whether a template wrote the mark in another form (JSON in ASCII), in which it cannot be taken out."""
    return bool(mark) and _escape(mark) in rendered.lower()


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


def _spells(value: Any, spelling: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return spelling.search(value) is not None
    if isinstance(value, dict):
        return any(_spells(key, spelling) or (key != "role" and _spells(item, spelling)) for key, item in value.items())
    return isinstance(value, list) and any(_spells(item, spelling) for item in value)


class MarkedTextEncoder:
    """Encodes rendered text: the control tokens in it as they are, everything else as text, without its marks.

    For a text without marks the ids are those of the tokenizer itself.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.literal = copy_literal_tokenizer(tokenizer)
        self._control_ids = set(list_control_tokens(tokenizer).values())
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


def _make_finder(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that encodes the added tokens alone, with their offsets, and drops all other text.

    It finds them by the tokenizer's own rules (lstrip, rstrip, single_word, the longest of several).
    """
    state = json.loads(tokenizer.to_str())
    vocabulary = {token["content"]: token["id"] for token in state["added_tokens"]}
    state |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "truncation": None, "padding": None}
    state["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    return Tokenizer.from_str(json.dumps(state))
