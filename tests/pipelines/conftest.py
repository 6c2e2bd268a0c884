"""Recipes for the tests of this room."""

import json

import pytest

from pipelines.recipes import RECIPES


@pytest.fixture
def smoke():
    return RECIPES["smoke"].build()


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory):
    """A tokenizer.json as large as Llama 3's vocabulary, with the special tokens the shards need."""
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    words = [f"w{index}" for index in range(128_256 - len(special))]
    vocab = {word: index for index, word in enumerate([*words, *special])}
    added = [
        {"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for token in special
    ]  # fmt: skip
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    path.write_text(
        json.dumps({"version": "1.0", "added_tokens": added, "model": model, "pre_tokenizer": {"type": "Whitespace"}})
    )
    return path
