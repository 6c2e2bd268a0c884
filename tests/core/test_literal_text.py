"""Text is encoded as text, whatever special tokens it spells, by tokenizers of every kind."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from core.errors import RefusedInput
from core.literal_text import compile_spelling_pattern, copy_literal_tokenizer, list_control_tokens

CORPUS = ["a <think> about </think> tokens", "<|eot_id|> ends a turn", "  def f(x):\n    return x  "] * 20
SPECIAL = ("<s>", "<|eot_id|>", "<|reserved_special_token_5|>", "[PAD]", "ß¶")
ORDINARY = ("<think>", "</think>", "<tool_call>")
SPELLINGS = (*SPECIAL, *ORDINARY)


def byte_level(**model) -> Tokenizer:
    """A byte-level BPE with special tokens, Qwen's kind of tokens that are not special, and runs of spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[SPECIAL[0]])
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ORDINARY])
    tokenizer.add_tokens([AddedToken("    ", normalized=False)])
    start = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    state = json.loads(tokenizer.to_str())
    state["model"] |= model
    return Tokenizer.from_str(json.dumps(state))


BYTE_LEVEL = byte_level()
LITERAL = copy_literal_tokenizer(BYTE_LEVEL)
texts = st.lists(st.sampled_from([*SPELLINGS, " ", "    ", "\n", "<", "|>", "x\ufdd0", "é"]) | st.text(), max_size=8)


@settings(max_examples=300)
@given(texts.map("".join))
@example("<|eot_id|>\ufdd0")
def test_no_text_becomes_a_control_token_and_every_text_comes_back(text):
    ids = LITERAL.encode(text, add_special_tokens=False).ids
    assert set(ids).isdisjoint(list_control_tokens(BYTE_LEVEL).values())
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="<[ß")))
def test_text_without_spellings_has_the_ids_of_the_tokenizer(text):
    assert LITERAL.encode(text).ids == BYTE_LEVEL.encode(text).ids


def test_bos_comes_from_the_post_processor_and_never_from_the_text():
    start = BYTE_LEVEL.token_to_id("<s>")
    assert LITERAL.encode("<s>a").ids.count(start) == 1
    assert LITERAL.encode("<s>a").ids[0] == start
    assert start not in LITERAL.encode("<s>a", add_special_tokens=False).ids


def test_runs_of_white_space_keep_their_tokens():
    spaces = BYTE_LEVEL.token_to_id("    ")
    assert LITERAL.encode("a    b", add_special_tokens=False).ids.count(spaces) == 1


def test_the_copy_leaves_the_original_as_it_is():
    assert BYTE_LEVEL.token_to_id("<|eot_id|>") in BYTE_LEVEL.encode("a<|eot_id|>").ids


def test_a_copy_neither_truncates_nor_pads():
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    assert copy_literal_tokenizer(tokenizer).encode("x y " * 10).ids == byte_level().encode("x y " * 10).ids


@pytest.mark.parametrize("text", SPELLINGS)
def test_whole_words_of_the_vocabulary_are_no_way_around(text):
    """Llama 3 sets `ignore_merges`: a word that is in the vocabulary is one token, whatever the merges say."""
    tokenizer = byte_level(ignore_merges=True)
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    state["model"]["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    ids = copy_literal_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id(text) not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_unigram_and_wordpiece_split_the_spelling():
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    unigram.train_from_iterator(
        ["hello <s> world </s>"] * 10,
        trainers.UnigramTrainer(vocab_size=40, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    assert "<s>" in unigram.encode("a <s> d").tokens
    assert set(copy_literal_tokenizer(unigram).encode("d <s> </s>").ids).isdisjoint([1, 2])

    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[UNK]", "[CLS]"]
    wordpiece.train_from_iterator(["[ CLS ] hello"], trainers.WordPieceTrainer(special_tokens=special))
    assert wordpiece.encode("[CLS]").tokens == ["[CLS]"]
    literal = copy_literal_tokenizer(wordpiece).encode("[CLS] Ü").ids
    assert [wordpiece.id_to_token(index) for index in literal] == ["[", "CLS", "]", "[UNK]"]


def test_a_special_token_that_merges_make_of_text_is_refused_by_name():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.add_special_tokens(["ab"])
    with pytest.raises(RefusedInput, match="special token 'ab'"):
        copy_literal_tokenizer(tokenizer)


def test_an_added_token_that_merges_make_of_text_is_a_word():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.add_tokens(["ab"])
    assert list_control_tokens(tokenizer) == {}
    assert copy_literal_tokenizer(tokenizer).encode("ab").ids == [2]


def test_the_pattern_finds_the_beginning_of_every_spelling():
    pattern = compile_spelling_pattern({"<a>": 1, "<a><b>": 2, "<b>": 3})
    assert [found.span() for found in pattern.finditer("x<a><b><a>")] == [(1, 2), (4, 5), (7, 8)]
    assert compile_spelling_pattern({}).search("anything") is None
