"""This package holds the prompts of three domains for profiling, and turns them into token ids of any model."""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from core.literal_text import copy_literal_tokenizer

DOMAINS = ("knowledge", "code", "maths")
DUMMY = "repeated token"
"""Name of the prompt that repeats one token. An MoE reads few of its experts for it, so its memory looks too low."""


def load_texts() -> dict[str, str]:
    """Return domain -> text of about 3,000 characters, written for this purpose."""
    return {domain: (Path(__file__).parent / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS}


def tokenize(artifact: Path, texts: Mapping[str, str], vocab_size: int, length: int) -> dict[str, list[int]]:
    """Return domain -> `length` token ids, and one more entry for DUMMY.

    A text that is too short is repeated. The artifact's tokenizer makes the ids. A baseline with random weights has no
    tokenizer. Then the id of a word is a checksum of the word and the space before it, modulo the vocabulary, which
    keeps the frequency and the order of words.

    Raises:
        RefusedInput: there is no text, one is empty or no text, its name is that of the other entry, or the tokenizer
            has ids that the model does not have.
    """
    check_texts(texts)
    if (artifact / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(artifact)
        ids = {domain: encode_text(tokenizer, text) for domain, text in texts.items()}
    else:
        words = {domain: re.findall(r"\s?\w+|\W", text) for domain, text in texts.items()}
        ids = {domain: [zlib.crc32(w.encode()) % vocab_size for w in found] for domain, found in words.items()}
    for domain, found in ids.items():
        if not found:
            raise RefusedInput(f"the prompt of domain {domain!r} has no tokens; give it some text")
        if max(found) >= vocab_size:
            raise RefusedInput(
                f"the tokenizer of {artifact} gives id {max(found)}: the model's ids are 0 to {vocab_size - 1}; put "
                "the model's own tokenizer there"
            )
    repeated = {domain: (found * (length // len(found) + 1))[:length] for domain, found in ids.items()}
    first = next(iter(repeated.values()))[0]
    return repeated | {DUMMY: [first] * length}


def check_texts(texts: Mapping[str, str]) -> None:
    """Check prompts before a tokenizer is loaded.

    Raises:
        RefusedInput: there is no text, one is empty or has half of a character, or its name is taken.
    """
    if not texts:
        raise RefusedInput("--prompts: there is no prompt; give a domain with a text, or leave the option out")
    if DUMMY in texts:
        raise RefusedInput(f"--prompts: {DUMMY!r} is measured in any case; give the domain another name")
    for domain, text in texts.items():
        if not text:
            raise RefusedInput(f"the prompt of domain {domain!r} is empty; give it some text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusedInput(
                f"the prompt of domain {domain!r} has half of a character (a surrogate) at {error.start}; remove it"
            ) from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text behind the tokenizer's begin-of-text token.

    A text that spells a special token, such as <|eot_id|>, is encoded as text: only a template writes special tokens.
    """
    return copy_literal_tokenizer(tokenizer.backend_tokenizer).encode(text).ids
