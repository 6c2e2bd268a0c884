"""The trained tokenizer and the chat encoding."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from core.errors import RefusedInput
from core.marked_text import UnusableConversationError
from core.special_tokens import SPECIAL_TOKENS
from data.tokens import tokenizer
from data.tokens.chat import Encoder
from data.tokens.existing_tokenizer import load_existing
from tests.data.growth import measure_growth
from tests.data.planted import page

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "\n\nHello there."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def conversation(encoder: Encoder, messages: list[dict] = CONVERSATION, max_tokens: int = 8192):
    """tokens, mask, shortened of one conversation."""
    return encoder.encode_conversation(messages, max_tokens)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = tokenizer.train((page(number) for number in range(40)), vocab_size=400)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tokenizer.save(made, folder)
    return tokenizer.load(folder)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([f"a{t}b" for t in SPECIAL_TOKENS]))
def test_any_document_comes_back_as_it_was(trained, text):
    (ids,) = Encoder(trained).encode_documents([text])
    assert ids.dtype == np.uint32
    assert (ids[0], ids[-1]) == (trained.bos_token_id, trained.eos_token_id)
    assert not set(ids[1:-1].tolist()) & set(trained.added_tokens_decoder)
    assert trained.decode(ids[1:-1].tolist()) == text


def test_vocabulary_is_exactly_as_large_as_asked_with_special_tokens_last(trained):
    assert len(trained) == 400
    assert sorted(trained.added_tokens_decoder) == list(range(400 - len(SPECIAL_TOKENS), 400))
    assert (trained.bos_token, trained.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert trained.pad_token == "<|finetune_right_pad_id|>"


def test_digits_are_split_by_three(trained):
    pieces = [piece for piece, _ in trained.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x 1234567")]
    assert pieces == ["x", "Ġ", "123", "456", "7"]


def test_digits_are_tokens_of_their_own_where_that_is_asked_for():
    made = tokenizer.train(iter(["12 12 12 123 123 abc abc abc"] * 9), 300, single_digits=True)
    assert made.tokenize("x 1234 abc") == ["x", "Ġ", "1", "2", "3", "4", "Ġabc"]


@pytest.mark.parametrize("unit", ["ab", "字", " ", "_", "\u0301", "a b"])
def test_training_takes_linear_time_for_a_word_without_end(unit):
    # 16 times as long: 16 times the work where it is linear, 256 times where it is quadratic.
    def train(text: str) -> None:
        tokenizer.train(iter([text]), 280)

    assert measure_growth(train, unit * 2_000, unit * 32_000) < 64


@pytest.mark.parametrize(("characters", "longest"), [(200, 200), (256, 256), (600, 256)])
def test_only_the_training_cuts_words_and_only_long_ones(characters, longest):
    word = "ab" * (characters // 2)
    made = tokenizer.train(iter([word]), 300).backend_tokenizer
    assert made.pre_tokenizer.pre_tokenize_str(word) == [(word, (0, characters))]
    merged = set(made.get_vocab()) - set(pre_tokenizers.ByteLevel.alphabet()) - set(SPECIAL_TOKENS)
    assert max(map(len, merged)) == longest


def test_ordinary_text_gives_the_merges_of_the_plain_training(trained):
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = trained.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400 - len(SPECIAL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    plain.train_from_iterator((page(number) for number in range(40)), trainer)
    merges = [json.loads(made.to_str())["model"]["merges"] for made in (trained.backend_tokenizer, plain)]
    assert len(merges[0]) == 400 - 256 - len(SPECIAL_TOKENS) and merges[0] == merges[1]


def test_mask_covers_answers_and_their_closing_token(trained):
    tokens, mask, _ = conversation(Encoder(trained))
    assert trained.decode(tokens[mask == 1].tolist()) == "\n\nHello there.<|eot_id|>4<|eot_id|>"
    assert trained.decode(tokens.tolist()) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n\n\nHello there.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    )


def test_prompt_tokens_are_those_of_inference(trained):
    tokens, mask, _ = conversation(Encoder(trained))
    prompt = trained.apply_chat_template(CONVERSATION[:2], add_generation_prompt=True)
    assert tokens[: len(prompt)].tolist() == prompt
    assert mask[: len(prompt)].sum() == 0 and mask[len(prompt)] == 1


def test_what_a_template_adds_after_the_closing_token_is_not_trained(trained):
    encoder = Encoder(trained)
    original = trained.chat_template
    trained.chat_template = original.replace("'<|eot_id|>' }}", "'<|eot_id|>\n' }}")
    try:
        tokens, mask, _ = conversation(encoder)
    finally:
        trained.chat_template = original
    assert trained.decode(tokens[mask == 1].tolist()) == "\n\nHello there.<|eot_id|>4<|eot_id|>"


def test_conversation_whose_past_the_template_rewrites_is_refused(trained):
    encoder = Encoder(trained)
    original = trained.chat_template
    trained.chat_template = "{{ messages | length }}" + original
    try:
        with pytest.raises(UnusableConversationError, match="changes the text of messages"):
            conversation(encoder)
    finally:
        trained.chat_template = original


def test_existing_tokenizer_loads_from_folder_and_from_its_json(trained, tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizer.save(trained, folder)
    from_folder = load_existing(str(folder))
    from_json = load_existing(str(folder / "tokenizer.json"))
    ids = Encoder(trained).encode_documents(["A river of 1234 lanterns."])[0].tolist()
    for loaded in (from_folder, from_json):
        assert Encoder(loaded).encode_documents(["A river of 1234 lanterns."])[0].tolist() == ids
        assert (loaded.bos_token, loaded.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
        assert conversation(Encoder(loaded))[1].sum() > 0


def test_existing_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(RefusedInput, match=r"data\.tokenizer\.path = .*lacks <\|begin_of_text\|>"):
        load_existing(str(path))
