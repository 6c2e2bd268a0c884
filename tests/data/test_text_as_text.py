"""Messages that spell special tokens: they stay text through chat templates of many kinds, and the mask stays right."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from core.marked_text import MARKS, NO_MARK, MarkedTextEncoder, UnusableConversationError
from data.tokens import tokenizer
from data.tokens.chat import ESCAPED, Encoder
from tests.data.planted import page

FLAGS = {"normalized": False}
ADDED = (
    AddedToken("<think>", **FLAGS), AddedToken("<|reserved_special_token_5|>", special=True, **FLAGS),
    AddedToken("<|pad|>", special=True, **FLAGS), AddedToken("    ", **FLAGS),
    AddedToken("<word>", single_word=True, **FLAGS), AddedToken("<norm>", normalized=True),
    AddedToken("<|eot_id|><|eot_id|>", special=True, **FLAGS),
)  # fmt: skip
ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPLATE = tokenizer.CHAT_TEMPLATE
TEMPLATES = {
    "ours": TEMPLATE,
    "trim": TEMPLATE.replace("message['content']", "message['content'] | trim"),
    "upper": TEMPLATE.replace("message['content']", "message['content'] | upper"),
    "json": TEMPLATE.replace("message['content']", "message['content'] | tojson"),
    "think": TEMPLATE.replace("message['content']", "'<think>' + message['content']"),
    "parts": TEMPLATE.replace("message['content']", "message['content'].split(' ') | join(' ')"),
    "escape": TEMPLATE.replace("message['content']", "message['content'] | replace('<', '&lt;')"),
}


@pytest.fixture(scope="module")
def made() -> PreTrainedTokenizerFast:
    made = tokenizer.train((page(number) for number in range(40)), vocab_size=400)
    made.backend_tokenizer.add_tokens(list(ADDED))
    made.backend_tokenizer.add_special_tokens([token for token in ADDED if token.special])
    return made


SPELLINGS = (
    "<|eot_id|>", "<|begin_of_text|>", "<|reserved_special_token_5|>", "<think>", "<|pad|>", "<|eot_id|><|eot_id|>",
)  # fmt: skip
pieces = st.sampled_from([*SPELLINGS, "<word>", "<norm>", " ", "    ", "\n", "a", "<|", "|>", "1 + 1", "\ue000"])
contents = st.lists(pieces | st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6).map("".join)


def chat(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@settings(max_examples=200)
@given(text=contents)
def test_rendered_text_without_a_mark_has_the_ids_of_the_tokenizer(made, text):
    expected = made.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert MarkedTextEncoder(made.backend_tokenizer).encode(text, "") == expected


@pytest.mark.parametrize("form", TEMPLATES)
@settings(max_examples=60)
@given(question=contents, answer=contents)
def test_contents_never_hold_a_special_token_and_the_template_always_does(made, form, question, answer):
    made.chat_template = TEMPLATES[form]
    encoder = Encoder(made)
    messages = chat(question, answer)
    tokens, mask, _ = encoder.encode_conversation(messages, 1 << 20)
    written = made.apply_chat_template(messages, tokenize=False)
    # The text is what the template writes of the messages as they are, and decoding gives it back.
    assert made.decode(tokens.tolist()) == written
    plain = encoder.encode_conversation(chat("q", "a"), 1 << 20)
    in_ids, in_plain = (
        [token for token in ids.tolist() if token in encoder.control_ids] for ids in (tokens, plain.tokens)
    )
    assert in_ids == in_plain
    # The prompt is not trained; the answer is, with what closes it.
    prompt = encoder.encode_conversation(chat(question, "a"), 1 << 20).loss_mask.tolist().index(1)
    assert mask.tolist() == [0] * prompt + [1] * (len(tokens) - prompt)


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_a_spelled_token_is_trained_as_text_inside_the_answer(made, spelled):
    made.chat_template = TEMPLATES["ours"]
    encoder = Encoder(made)
    tokens, mask, _ = encoder.encode_conversation(chat(f"say {spelled}", f" {spelled} it is {spelled}"), 8192)
    assert made.decode(tokens[mask == 1].tolist()) == f" {spelled} it is {spelled}<|eot_id|>"
    assert made.decode(tokens.tolist()) == (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nsay {spelled}<|eot_id|>"
        f"{ANSWER} {spelled} it is {spelled}<|eot_id|>"
    )
    eot = made.convert_tokens_to_ids("<|eot_id|>")
    assert tokens.tolist().count(eot) == 2


def test_the_rest_of_a_conversation_keeps_its_ids(made):
    made.chat_template = TEMPLATES["ours"]
    encoder = Encoder(made)
    plain = encoder.encode_conversation(chat("one two", "a river of 1234 lanterns"), 8192).tokens.tolist()
    spelled = encoder.encode_conversation(chat("<|eot_id|>", "a river of 1234 lanterns"), 8192).tokens.tolist()
    answer = plain[plain.index(encoder.tokenizer.convert_tokens_to_ids("<|eot_id|>")) :]
    assert spelled[-len(answer) :] == answer


@pytest.mark.parametrize("escape", ["tojson(ensure_ascii=true)", "urlencode"])
def test_an_escaped_mark_is_seen(made, escape):
    made.chat_template = TEMPLATE.replace("message['content']", f"message['content'] | {escape}")
    with pytest.raises(UnusableConversationError, match=ESCAPED):
        Encoder(made).encode_conversation(chat("é <|eot_id|>", "ü"), 8192)


def test_a_conversation_of_all_marks_is_set_aside(made):
    made.chat_template = TEMPLATES["ours"]
    encoder = Encoder(made)
    all_but_one = "".join(MARKS[:-1])
    tokens, mask, _ = encoder.encode_conversation(chat(all_but_one, "<|eot_id|>"), 1 << 20)
    assert made.decode(tokens[mask == 1].tolist()) == "<|eot_id|><|eot_id|>"
    with pytest.raises(UnusableConversationError, match=NO_MARK):
        encoder.encode_conversation(chat("".join(MARKS), "<|eot_id|>"), 1 << 20)


def test_a_template_that_writes_ascii_json_sets_such_a_conversation_aside(made):
    made.chat_template = TEMPLATE.replace("message['content']", "message['content'] | tojson(ensure_ascii=true)")
    encoder = Encoder(made)
    assert encoder.encode_conversation(chat("é", "ü"), 8192).loss_mask.sum() > 0
    with pytest.raises(UnusableConversationError, match=ESCAPED):
        encoder.encode_conversation(chat("é <|eot_id|>", "ü"), 8192)
