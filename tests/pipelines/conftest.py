"""Recipes for the tests of this room."""

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from core.special_tokens import SPECIAL_TOKENS
from pipelines.recipes import RECIPES


@pytest.fixture
def smoke():
    return RECIPES["smoke"].build()


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory):
    """A byte-level tokenizer.json as large as Llama 3's vocabulary, with the special tokens of Llama 3.1."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [f"w{index}" for index in range(128_256 - len(alphabet) - len(SPECIAL_TOKENS))]
    tokenizer = Tokenizer(BPE({text: index for index, text in enumerate(alphabet + words)}, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
