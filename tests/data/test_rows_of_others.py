"""Rows as public instruction corpora hold them, in every file format: the conversation that each must become.

The shapes (fields, nesting, null fields, JSON inside of strings) are those of the published files; the texts are ours.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Corpus, RemoteFiles, Unit
from data.readers import remote_readers
from data.readers.corpus_reader import find_problem
from tests.data.test_readers import FORMATS, write_rows

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"city": {"type": "str", "description": "Name of the city"}},
}
TOOLS = json.dumps([WEATHER])
CALLS = '[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}]'
ARGUMENTS = {"city": "Zürich", "days": 2}
ARGUMENTS_TEXT = '{"city": "Zürich", "days": 2}'
ASKED = {"role": "user", "content": "Weather in Zürich?"}
ANSWER = {"role": "assistant", "content": "a"}


def read_local(folder: Path, entry: Corpus, pattern: str = "*") -> list[dict]:
    """Return the records that a corpus of the catalogue reads from the files of a folder."""
    source = RemoteFiles(str(folder), pattern, entry.source.columns)
    local = dataclasses.replace(entry, source=source, max_documents=None)
    return list(local.read(Unit(local, str(folder), 0, 0)))


def make_corpus(columns: tuple[str, ...], read=remote_readers.read_messages) -> Corpus:
    """Return a corpus of conversations with these columns, for `read_local`."""
    source = RemoteFiles("", "*", columns)
    return Corpus("other", "chat", "sft", "conversation", "test", source, read, text_bytes=1)


def read_one(folder: Path, messages: object, name: str = "a.jsonl") -> dict:
    """Return the record of one row whose column `messages` has this value."""
    write_rows(folder / name, [{"messages": messages}])
    (record,) = read_local(folder, make_corpus(("messages",)), name)
    return record


def turns(*pairs: tuple[str, str]) -> list[dict]:
    """Return messages of (role, content) pairs."""
    return [{"role": role, "content": content} for role, content in pairs]


PUBLISHED = {
    "toolace": (
        {
            "system": f"You compose functions. Here is a list of functions in JSON format:\n{TOOLS}\n",
            "conversations": [
                {"from": "user", "value": "Weather in Zürich?"},
                {"from": "assistant", "value": '[get_weather(city="Zürich")]'},
                {"from": "tool", "value": '[{"name": "get_weather", "results": {"sky": "blue"}}]'},
                {"from": "assistant", "value": "The sky is blue."},
            ],
        },
        turns(
            ("system", f"You compose functions. Here is a list of functions in JSON format:\n{TOOLS}\n"),
            ("user", "Weather in Zürich?"),
            ("assistant", '[get_weather(city="Zürich")]'),
            ("tool", '[{"name": "get_weather", "results": {"sky": "blue"}}]'),
            ("assistant", "The sky is blue."),
        ),
    ),
    "hermes-function-calling": (
        {
            "id": "85f0c398",
            "conversations": [
                {"from": "system", "value": f"You call functions.\n<tools>\n{TOOLS}\n</tools>"},
                {"from": "human", "value": "Weather in Zürich?"},
                {"from": "gpt", "value": "<tool_call>\n{'name': 'get_weather', 'arguments': {}}\n</tool_call>"},
                {"from": "tool", "value": '<tool_response>\n{"sky": "blue"}\n</tool_response>\n'},
                {"from": "gpt", "value": "The sky is blue."},
                {"from": "human", "value": "Thanks!"},
            ],
            "tools": TOOLS,
            "category": "Weather",
            "schema": None,
        },
        turns(
            ("system", f"You call functions.\n<tools>\n{TOOLS}\n</tools>"),
            ("user", "Weather in Zürich?"),
            ("assistant", "<tool_call>\n{'name': 'get_weather', 'arguments': {}}\n</tool_call>"),
            ("tool", '<tool_response>\n{"sky": "blue"}\n</tool_response>\n'),
            ("assistant", "The sky is blue."),
        ),
    ),
    "xlam-function-calling": (
        {"id": 0, "query": "Weather in Zürich?", "answers": CALLS, "tools": TOOLS},
        turns(
            ("system", f"You may call these functions:\n{TOOLS}"),
            ("user", "Weather in Zürich?"),
            ("assistant", CALLS),
        ),
    ),
    "nemotron-tools": (
        {
            "uuid": "u",
            "category": "tool_calling",
            "reasoning": "on",
            "messages": [
                {"role": "system", "content": "", "tool_calls": []},
                {"role": "user", "content": "Weather in Zürich?", "tool_calls": []},
                {
                    "role": "assistant",
                    "content": "<think>\nA call.\n</think>\n",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "days": 2}'},
                        }
                    ],
                },
                {"role": "tool", "content": '{"sky": "blue"}', "tool_calls": []},
                {"role": "assistant", "content": "The sky is blue.", "tool_calls": []},
            ],
            "metadata": "{}",
        },
        turns(
            ("user", "Weather in Zürich?"),
            ("assistant", f"<think>\nA call.\n</think>\n\n{CALLS}"),
            ("tool", '{"sky": "blue"}'),
            ("assistant", "The sky is blue."),
        ),
    ),
    "nemotron-safety": (
        {
            "input": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, ASKED],
            "output": "Sunny.",
            "system_prompt": "detailed thinking off",
            "used_in_training": ["Ultra"],
        },
        turns(("user", "q"), ("assistant", "a"), ("user", "Weather in Zürich?"), ("assistant", "Sunny.")),
    ),
    "wildchat": (
        {
            "conversation_hash": "4d1f",
            "model": "gpt-4",
            "conversation": [
                {"content": "Weather in Zürich?", "country": "Switzerland", "language": "English", "role": "user"},
                {"content": "Sunny.", "country": None, "language": "English", "role": "assistant", "toxic": False},
            ],
            "openai_moderation": [{"flagged": False}],
            "turn": 1,
        },
        turns(("user", "Weather in Zürich?"), ("assistant", "Sunny.")),
    ),
    "ultrachat": (
        {
            "prompt": "Weather in Zürich?",
            "prompt_id": "f0e3",
            "messages": [ASKED, {"content": "Sunny.", "role": "assistant"}],
        },
        turns(("user", "Weather in Zürich?"), ("assistant", "Sunny.")),
    ),
    "nemotron-chat-2": (
        {
            "uuid": "a1",
            "license": "cc-by-4.0",
            "reasoning": "off",
            "messages": [{"role": "system", "content": ""}, ASKED, {"role": "assistant", "content": "Sunny."}],
        },
        turns(("user", "Weather in Zürich?"), ("assistant", "Sunny.")),
    ),
    "nemotron-safety-2": (
        {
            "uuid": "a1",
            "messages": [ASKED, {"role": "assistant", "content": "I cannot say.", "reasoning_content": "A thought."}],
            "used_in": ["super_v3"],
        },
        turns(("user", "Weather in Zürich?"), ("assistant", "I cannot say.")),
    ),
    "tulu-3": (
        {"id": "x", "messages": [ASKED, {"role": "assistant", "content": "Sunny."}], "source": "ai2/some"},
        turns(("user", "Weather in Zürich?"), ("assistant", "Sunny.")),
    ),
    "open-thoughts": (
        {
            "difficulty": 8,
            "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "<think>2</think>2"}],
        },
        turns(("user", "1+1?"), ("assistant", "<think>2</think>2")),
    ),
}
"""Corpus of the catalogue -> (a row of its files, the conversation)."""


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("corpus", PUBLISHED)
def test_row_of_a_published_corpus(tmp_path, corpus, name):
    row, expected = PUBLISHED[corpus]
    write_rows(tmp_path / name, [row])
    (record,) = read_local(tmp_path, CATALOGUE[corpus])
    assert record == {"messages": expected}
    assert find_problem(record, "sft") is None


OTHERS = {
    # OpenHermes-2.5: a weight beside the value; other turns of the file have none.
    "weight": (
        [{"from": "human", "value": "q", "weight": None}, {"from": "gpt", "value": "a", "weight": 1.0}],
        turns(("user", "q"), ("assistant", "a")),
    ),
    # WildChat: much beside role and content, a time among it.
    "wildchat": (
        [
            {"content": "q", "role": "user", "language": "English", "toxic": False, "timestamp": None},
            {"content": "a", "role": "assistant", "language": "English", "toxic": False, "timestamp": "2024-01-01"},
        ],
        turns(("user", "q"), ("assistant", "a")),
    ),
    # Glaive and APIGen-MT, as converted for LLaMA-Factory.
    "observation": (
        [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "{}"},
            {"from": "gpt", "value": "a"},
        ],
        turns(("user", "q"), ("assistant", '{"name": "f", "arguments": {}}'), ("tool", "{}"), ("assistant", "a")),
    ),
    # function-calling-chatml spells them with hyphens.
    "hyphens": (
        [
            {"from": "human", "value": "q"},
            {"from": "function-call", "value": '{"name": "f"}'},
            {"from": "function-response", "value": "{}"},
            {"from": "gpt", "value": "a"},
        ],
        turns(("user", "q"), ("assistant", '{"name": "f"}'), ("tool", "{}"), ("assistant", "a")),
    ),
    # OpenAI's responses: parts of input and output text, and a developer.
    "parts": (
        [
            {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "q1"}, {"type": "text", "text": " q2"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
        ],
        turns(("system", "Be brief."), ("user", "q1 q2"), ("assistant", "a")),
    ),
    # Parts beside a call: the text once, the call once.
    "parts and a call": (
        [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "I look."}],
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
        ],
        turns(("user", "q"), ("assistant", 'I look.\n[{"name": "f", "arguments": {"a": 1}}]')),
    ),
    # ShareGPT's own names of the answering side, Gemma's, and white space and capitals.
    "speakers": (
        [
            {"from": "Human", "value": "q"},
            {"from": "chatgpt", "value": "a"},
            {"from": " USER ", "value": "r"},
            {"from": "model", "value": "b"},
            {"from": "human", "value": "s"},
            {"from": "chatbot", "value": "c"},
        ],
        turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"), ("user", "s"), ("assistant", "c")),
    ),
    # Llama 3.1 answers a call as ipython; a function may return nothing.
    "ipython": (
        [ASKED, {"role": "assistant", "content": "f()"}, {"role": "ipython", "content": ""},
         {"role": "assistant", "content": "a"}],
        [ASKED, *turns(("assistant", "f()"), ("tool", ""), ("assistant", "a"))],
    ),
    # OpenAI's old form of a call.
    "function_call": (
        [
            {"role": "user", "content": "q", "function_call": None, "name": None},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": [1, null]}'}},
            {"role": "function", "content": "2", "name": "f"},
            {"role": "assistant", "content": "a"},
        ],
        turns(
            ("user", "q"), ("assistant", '[{"name": "f", "arguments": {"a": [1, null]}}]'), ("tool", "2"),
            ("assistant", "a"),
        ),
    ),
    "system messages that say nothing": (
        [{"role": "system", "content": None}, {"role": "system", "content": " \n"}, ASKED, ANSWER],
        [ASKED, ANSWER],
    ),
    "ends after the user": (
        [ASKED, {"role": "assistant", "content": "a"}, {"role": "user", "content": "bye"}],
        [ASKED, {"role": "assistant", "content": "a"}],
    ),
}  # fmt: skip
"""Form of another public corpus -> (messages as its rows have them, the conversation)."""


@pytest.mark.parametrize("name", ("a.parquet", "stream.arrow", "a.jsonl"))
@pytest.mark.parametrize("form", OTHERS)
def test_messages_of_other_corpora(tmp_path, form, name):
    messages, expected = OTHERS[form]
    record = read_one(tmp_path, messages, name)
    assert record == {"messages": expected}
    assert find_problem(record, "sft") is None


CALL_FORMS = {
    "openai": [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS_TEXT}}],
    "objects": [{"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}],
    "flat": [{"name": "get_weather", "arguments": ARGUMENTS}],
    "flat text": [{"name": "get_weather", "arguments": '{"city":"Z\\u00fcrich","days":2}'}],
    "single": {"name": "get_weather", "arguments": ARGUMENTS},
    "json text": CALLS,
    "json text of one": json.dumps({"name": "get_weather", "arguments": ARGUMENTS}),
    "list of json texts": [json.dumps({"name": "get_weather", "arguments": ARGUMENTS})],
    "function as text": [{"function": json.dumps({"name": "get_weather", "arguments": ARGUMENTS_TEXT})}],
    "langchain": [{"name": "get_weather", "args": ARGUMENTS, "id": "1", "type": "tool_call"}],
    "llama": [{"name": "get_weather", "parameters": ARGUMENTS}],
}


@pytest.mark.parametrize("name", ("a.parquet", "stream.arrow", "a.jsonl"))
@pytest.mark.parametrize("form", CALL_FORMS)
def test_a_call_is_the_same_text_in_every_form(tmp_path, form, name):
    record = read_one(tmp_path, [ASKED, {"role": "assistant", "content": "", "tool_calls": CALL_FORMS[form]}], name)
    assert record == {"messages": [ASKED, {"role": "assistant", "content": CALLS}]}


@pytest.mark.parametrize("empty", ("", "{}", None, {}))
def test_a_call_without_arguments(tmp_path, empty):
    calls = [{"name": "now", "arguments": empty}]
    record = read_one(tmp_path, [ASKED, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert record["messages"][-1]["content"] == '[{"name": "now", "arguments": {}}]'


@pytest.mark.parametrize("name", ("a.parquet", "file.arrow"))
def test_a_struct_of_all_arguments_gives_each_call_its_own(tmp_path, name):
    """Parquet has one struct for the arguments of all calls: the fields of the others come back as null."""
    calls = [
        {"name": "f", "arguments": {"city": "x", "when": {"day": 1}}},
        {"name": "g", "arguments": {"unit": "C", "stops": [{"at": "a"}, {"at": "b", "platform": 3}]}},
    ]
    rows = [
        {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}], "name": "row"}
        for call in calls
    ]
    write_rows(tmp_path / name, rows)
    records = read_local(tmp_path, make_corpus(("messages",)))
    assert [record["messages"][-1]["content"] for record in records] == [json.dumps([call]) for call in calls]


def test_a_null_that_a_json_row_states_stays(tmp_path):
    calls = [{"name": "f", "arguments": {"city": "x", "unit": None}}]
    record = read_one(tmp_path, [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}])
    assert record["messages"][-1]["content"] == '[{"name": "f", "arguments": {"city": "x", "unit": null}}]'


def arrow_types() -> Iterator[tuple[str, pa.DataType]]:
    """Yield Arrow's ways to store messages: (name, type of the column)."""
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    yield "list", pa.list_(message)
    yield "large list", pa.large_list(message)
    yield "fixed list", pa.list_(message, 2)
    yield "list view", pa.list_view(message)
    yield "strings", pa.list_(pa.struct([("role", pa.large_string()), ("content", pa.string_view())]))
    yield "map", pa.list_(pa.map_(pa.string(), pa.string()))
    yield "json text", pa.string()


@pytest.mark.parametrize(("form", "kind"), list(arrow_types()))
def test_arrow_types_of_messages(tmp_path, form, kind):
    messages = turns(("user", "q"), ("assistant", "a"))
    value = json.dumps(messages) if form == "json text" else messages
    if form == "map":
        value = [list(message.items()) for message in messages]
    table = pa.table({"messages": pa.array([value], kind)})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read_local(tmp_path, make_corpus(("messages",))) == [{"messages": messages}]


def test_json_type_of_arrow(tmp_path):
    """`datasets` stores objects of changing fields with Arrow's JSON type."""
    messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": json.loads(CALLS)}]
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps(messages)]))
    pyarrow.parquet.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    (record,) = read_local(tmp_path, make_corpus(("messages",)))
    assert record == {"messages": [ASKED, {"role": "assistant", "content": CALLS}]}


@pytest.mark.parametrize(
    "kind", (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string()))
)
def test_arrow_types_of_text(tmp_path, kind):
    values = ["grüße", None, "b"]
    pyarrow.parquet.write_table(pa.table({"text": pa.array(values, pa.string()).cast(kind)}), tmp_path / "a.parquet")
    corpus = dataclasses.replace(make_corpus(("text",), remote_readers.read_text), kind="text")
    records = read_local(tmp_path, corpus)
    assert [find_problem(record, "text") is None for record in records] == [True, False, True]
    assert [records[0]["text"], records[2]["text"]] == ["grüße", "b"]
