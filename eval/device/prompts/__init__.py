"""This package holds the prompts of three domains for profiling, and turns them into token ids of any model."""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from core.errors import RefusedInput

DOMAINS = ("knowledge", "code", "maths")
DUMMY = "repeated token"
"""Name of the prompt that repeats one token. An MoE reads few of its experts for it, so its memory looks too low."""


def load_texts() -> dict[str, str]:
    """Return domain -> text of about 3,000 characters, written for this purpose."""
    return {domain: (Path(__file__).parent / f"{domain}.txt").read_text() for domain in DOMAINS}


def tokenize(artifact: Path, texts: Mapping[str, str], vocab_size: int, length: int) -> dict[str, list[int]]:
    """Return domain -> `length` token ids, and one more entry for DUMMY.

    A text that is too short is repeated. The artifact's tokenizer makes the ids. A baseline with random weights has no
    tokenizer. Then the id of a word is a checksum of the word and the space before it, modulo the vocabulary, which
    keeps the frequency and the order of words.

    Raises:
        RefusedInput: a text is empty.
    """
    if (artifact / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(artifact)
        ids = {domain: tokenizer(text)["input_ids"] for domain, text in texts.items()}
    else:
        words = {domain: re.findall(r"\s?\w+|\W", text) for domain, text in texts.items()}
        ids = {domain: [zlib.crc32(w.encode()) % vocab_size for w in found] for domain, found in words.items()}
    for domain, found in ids.items():
        if not found:
            raise RefusedInput(f"the prompt of domain {domain!r} is empty; give it some text")
    repeated = {domain: (found * (length // len(found) + 1))[:length] for domain, found in ids.items()}
    first = next(iter(repeated.values()))[0]
    return repeated | {DUMMY: [first] * length}
