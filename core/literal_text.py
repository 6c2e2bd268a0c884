"""Encodes text as text: what spells a special token becomes ordinary tokens, never that token.

Only a chat template and the code that adds bos and eos write special tokens. Documents, messages, benchmark items and
prompts pass through a copy of the tokenizer that does not know them. `Tokenizer` is the class of the tokenizers library
(`backend_tokenizer` of a fast transformers tokenizer); this module calls its public methods only, and imports nothing.
"""

import json
import re
from typing import Any

from core.errors import RefusedInput

NONCHARACTER = "\ufdd0"
"""A code point that Unicode keeps for internal use. No entry of a vocabulary that ends with it matches a text."""


def list_control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return text -> id of the added tokens that a text must not become, for a tokenizers `Tokenizer`.

    An added token that is not marked as special and consists of white space alone is no control token: GPT-NeoX and
    CodeGen have such tokens for indented text. Nor is one that the merges of a BPE make of ordinary text.
    """
    return _list_control(json.loads(tokenizer.to_str()))


def copy_literal_tokenizer(tokenizer: Any) -> Any:
    """Return a copy of a tokenizers `Tokenizer` that encodes the spelling of a control token as ordinary text.

    The copy neither truncates nor pads. Its post-processor still adds what `add_special_tokens=True` asks for. Decode
    with the original.

    Raises:
        RefusedInput: ordinary text becomes one of the control tokens even without its entry; names the token.
    """
    state = json.loads(tokenizer.to_str())
    control = _list_control(state)
    unknown = state["model"].get("unk_token")
    state["truncation"] = state["padding"] = None
    _hide_from_model(state["model"], set(control))
    for token in state["added_tokens"]:
        if token["content"] in control:
            # The entry stays, so that the ids of the other added tokens stay. Only a special one can be switched off.
            token |= {"content": token["content"] + NONCHARACTER, "special": True}
    literal = type(tokenizer).from_str(json.dumps(state))
    literal.encode_special_tokens = True
    unknown_id = state["model"].get("unk_id") if unknown is None else control.get(unknown)
    for text, index in control.items():
        # Where a text holds letters that the vocabulary lacks, the token for unknown text is right.
        if index != unknown_id and index in literal.encode(text, add_special_tokens=False).ids:
            raise RefusedInput(
                f"the tokenizer makes the special token {text!r} of text that spells it, even when the token is "
                "switched off; take a tokenizer whose special tokens are no words of its vocabulary"
            )
    return literal


def compile_spelling_pattern(control: dict[str, int]) -> re.Pattern[str]:
    """Return a pattern that matches the first character of every spelling of a control token, overlapping ones too."""
    # Without alternatives the group would match everywhere, where nothing shall match.
    spellings = "|".join(map(re.escape, control)) or "(?!)"
    return re.compile(f"(?={spellings})(?s:.)")


def _list_control(state: dict[str, Any]) -> dict[str, int]:
    """Return text -> id of the control tokens of a tokenizer.json's content."""
    merged = _list_merged(state["model"])
    return {
        token["content"]: token["id"]
        for token in state["added_tokens"]
        if token["special"] or (token["content"].strip() and token["content"] not in merged)
    }


def _hide_from_model(model: dict[str, Any], control: set[str]) -> None:
    """Rename the entries of control tokens in a model's vocabulary, in place, so that no text matches them.

    Their ids stay. Unigram matches every entry of its vocabulary, and BPE with `ignore_merges` does so for whole words.
    """
    hidden = control - _list_merged(model)
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {text + NONCHARACTER * (text in hidden): index for text, index in vocabulary.items()}
    elif vocabulary:
        model["vocab"] = [[text + NONCHARACTER * (text in hidden), score] for text, score in vocabulary]
    if model.get("unk_token") in hidden:
        model["unk_token"] += NONCHARACTER


def _list_merged(model: dict[str, Any]) -> set[str]:
    """Return the entries that the merges of a BPE use or make; other models have none."""
    merged = set()
    for merge in model.get("merges") or ():
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        merged |= {left, right, left + right}
    return merged
