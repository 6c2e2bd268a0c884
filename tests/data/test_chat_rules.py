"""Conversations: what is trained of tools and system roles, and what becomes of one that is too long."""

import json

import pytest
from datatrove.data import Document
from transformers import AutoTokenizer

from core.atomic import remove
from core.marked_text import UnusableConversationError
from data.tokens import mds, tokenizer
from data.tokens.chat import NO_ANSWER, TOO_LONG, Encoder
from data.tokens.shard_writer import REFUSED_PREFIX, ShardWriter, load_encoder
from data.tokens.tokenizer_files import hash_tokenizer_files
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
    writer = ShardWriter(folder, tmp_path / "parts", tmp_path / "set_aside", ["c.00000"], 1 << 20, limit)
    writer.run(documents, 0, 1)
    (line,) = (tmp_path / "set_aside/c.00000.jsonl").read_text().splitlines()
    assert json.loads(line) == {"reason": TOO_LONG, "id": "1", "sample": json.dumps(long)}
    assert (writer.stats["too_long"].total, writer.stats["shortened"].total) == (1, 1)
    mds.assemble([("c", tmp_path / "parts/00000")], tmp_path, "shards/sft/tool_use", "v")
    assert len(samples(tmp_path / "shards/sft/tool_use")) == 2


def test_saved_tokenizer_renders_as_the_encoder_does(folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    found = Encoder(loaded).encode_conversation(TOOLS, 8192)
    assert found.tokens.tolist() == loaded.apply_chat_template(TOOLS)


def count_renders(encoder: Encoder, num_turns: int, monkeypatch) -> int:
    """Encode a conversation of many short turns; return how often the template was rendered."""
    calls = []
    with monkeypatch.context() as patch:
        render = encoder.tokenizer.apply_chat_template
        patch.setattr(
            encoder.tokenizer, "apply_chat_template", lambda *args, **kwargs: calls.append(1) or render(*args, **kwargs)
        )
        assert encoder.encode_conversation(TOOLS[1:3] * num_turns, 512).shortened
    return len(calls)


def test_what_comes_after_the_last_answer_that_fits_costs_no_rendering(encoder, monkeypatch):
    assert count_renders(encoder, 10_000, monkeypatch) == count_renders(encoder, 20, monkeypatch) < 20


def answer_after(*messages: dict) -> list[dict]:
    return [*messages, {"role": "assistant", "content": "Yes."}]


ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate!') }}{% endif %}{% endfor %}"
)


def test_conversations_that_the_template_refuses_are_set_aside_by_reason(folder, tmp_path):
    """Mistral's and Gemma's templates raise on system messages, and on two of one role in a row."""
    made = tokenizer.load(folder)
    made.chat_template = ALTERNATING + made.chat_template
    tokenizer.save(made, tmp_path / "tokenizer")
    user, system = {"role": "user", "content": "Hi?"}, {"role": "system", "content": "Be brief."}
    chats = [answer_after(user), answer_after(system, user), answer_after(user, user), [*answer_after(user), user]]
    chats += [answer_after(user, user)] * 20 + [[user], answer_after(user, {"role": "user", "content": None})]
    chats += [answer_after()]
    metadata = {"corpus": "c", "domain": "chat", "kind": "sft", "split": "sft"}
    documents = [
        Document(text="t", id=str(number), metadata=metadata | {"messages": messages})
        for number, messages in enumerate(chats)
    ]
    writer = ShardWriter(tmp_path / "tokenizer", tmp_path / "parts", tmp_path / "set_aside", ["c.00000"], 1 << 20, 8192)
    writer.run(documents, 0, 1)
    lines = [json.loads(line) for line in (tmp_path / "set_aside/c.00000.jsonl").read_text().splitlines()]
    alternate = "the chat template fails with TemplateError: Conversation roles must alternate!"
    # Ten samples of a reason, and all of them counted.
    assert [line["reason"] for line in lines].count(alternate) == 10
    assert json.loads(lines[0]["sample"]) == chats[1] and lines[0]["id"] == "1"
    counted = {key: value.total for key, value in writer.stats.stats.items() if key.startswith(REFUSED_PREFIX)}
    assert counted == {f"{REFUSED_PREFIX}{alternate}": 24, f"{REFUSED_PREFIX}{NO_ANSWER}": 1}
    mds.assemble([("c", tmp_path / "parts/00000")], tmp_path, "shards/sft/chat", "v")
    assert len(samples(tmp_path / "shards/sft/chat")) == 2


def test_another_template_in_the_same_folder_is_another_encoder(folder, tmp_path):
    """A worker process outlives a run, and the next run may write another template to the same place."""
    made = tokenizer.load(folder)
    rendered = []
    for text in ("one", "two"):
        made.chat_template = f"{tokenizer.CHAT_TEMPLATE}{{# {text} #}}"
        remove(tmp_path / "tokenizer")
        tokenizer.save(made, tmp_path / "tokenizer")
        hashes = tuple(hash_tokenizer_files(str(tmp_path / "tokenizer")).items())
        rendered.append(load_encoder(tmp_path / "tokenizer", hashes).tokenizer.chat_template[-9:])
    assert rendered == ["{# one #}", "{# two #}"]
