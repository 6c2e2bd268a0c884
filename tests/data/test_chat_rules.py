"""Conversations: what is trained of tools and system roles, and what becomes of one that is too long."""

import json

import pytest
from datatrove.data import Document
from transformers import AutoTokenizer

from data.tokens import mds, tokenizer
from data.tokens.chat import TOO_LONG, Encoder, UnusableConversationError
from data.tokens.shard_writer import ShardWriter
from tests.data.planted import page
from tests.data.test_pipeline import samples

TOOLS = [
    {"role": "system", "content": 'You may call these functions:\n[{"name": "gcd"}]'},
    {"role": "user", "content": "What is the gcd of 12 and 18?"},
    {"role": "assistant", "content": '{"name": "gcd", "arguments": {"a": 12, "b": 18}}'},
    {"role": "tool", "content": '{"result": 6}'},
    {"role": "assistant", "content": "It is 6."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tokenizer.train((page(number) for number in range(40)), vocab_size=400)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tokenizer.save(made, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder(tokenizer.load(folder))


def trained(encoder: Encoder, conversation) -> str:
    return encoder.tokenizer.decode(conversation.tokens[conversation.loss_mask == 1].tolist())


def test_calls_and_answers_are_trained_but_neither_tools_nor_results(encoder):
    found = encoder.encode_conversation(TOOLS, 8192)
    assert trained(encoder, found) == ('{"name": "gcd", "arguments": {"a": 12, "b": 18}}<|eot_id|>It is 6.<|eot_id|>')
    untrained = encoder.tokenizer.decode(found.tokens[found.loss_mask == 0].tolist())
    assert "You may call" in untrained and '{"result": 6}' in untrained
    assert not found.shortened


def test_batches_do_not_change_what_comes_out(encoder):
    texts = ["one text", "", "another <|eot_id|> text"]
    assert [ids.tolist() for ids in encoder.encode_documents(texts)] == [
        encoder.encode_documents([text])[0].tolist() for text in texts
    ]


def test_a_long_conversation_ends_after_its_last_answer_that_fits(encoder):
    whole = encoder.encode_conversation(TOOLS, 8192)
    first = encoder.encode_conversation(TOOLS[:3], 8192)
    for limit in (len(whole.tokens) - 1, len(first.tokens)):
        cut = encoder.encode_conversation(TOOLS, limit)
        assert cut.shortened and cut.tokens.tolist() == first.tokens.tolist()
        assert trained(encoder, cut).endswith("<|eot_id|>")
    with pytest.raises(UnusableConversationError, match="first answer does not fit"):
        encoder.encode_conversation(TOOLS, len(first.tokens) - 1)


def test_one_whose_first_answer_does_not_fit_is_set_aside_and_counted(folder, encoder, tmp_path):
    metadata = {"corpus": "c", "domain": "tool_use", "kind": "sft", "split": "sft"}
    long = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 200}]
    documents = [
        Document(text=str(number), id=str(number), metadata=metadata | {"messages": messages})
        for number, messages in enumerate([TOOLS[:3], long, TOOLS])
    ]
    limit = len(encoder.encode_conversation(TOOLS, 8192).tokens) - 1
    writer = ShardWriter(folder, tmp_path / "parts", tmp_path / "set_aside", 1 << 20, limit)
    writer.run(documents, 0, 1)
    (line,) = (tmp_path / "set_aside/00000.jsonl").read_text().splitlines()
    assert json.loads(line) == {"reason": TOO_LONG, "id": "1", "sample": json.dumps(long)}
    assert (writer.stats["too_long"].total, writer.stats["shortened"].total) == (1, 1)
    mds.assemble(tmp_path / "parts", tmp_path, "shards/sft/tool_use", "v")
    assert len(samples(tmp_path / "shards/sft/tool_use")) == 2


def test_saved_tokenizer_renders_as_the_encoder_does(folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    found = Encoder(loaded).encode_conversation(TOOLS, 8192)
    assert found.tokens.tolist() == loaded.apply_chat_template(TOOLS)
