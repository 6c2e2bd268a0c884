"""Rows of public corpora that cannot be used: each is set aside by its reason, and its neighbours are read."""

import copy
import dataclasses
import datetime
import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet
import pytest

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import RemoteFiles, Unit
from data.readers import remote_readers
from data.readers.corpus_reader import find_problem
from tests.data.test_readers import PUBLISHED_ROWS, write_rows
from tests.data.test_rows_of_others import (
    ANSWER,
    ASKED,
    PUBLISHED,
    make_corpus,
    read_local,
    read_one,
)


def calling(calls: object) -> list[dict]:
    """Return a question and a message of the assistant with these calls."""
    return [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]


def saying(content: object) -> list[dict]:
    """Return a message of the user with this content, and an answer."""
    return [{"role": "user", "content": content}, ANSWER]


@pytest.mark.parametrize("name", ("a.parquet", "a.arrow"))
def test_a_value_that_python_cannot_hold_sets_aside_its_row(tmp_path, name):
    """Some writers put bytes that are not UTF-8 into a column of text, or times that no calendar has among messages."""
    text = pa.array([b"before", b"\xff\xfe", b"after"]).view(pa.string())
    turn = {"role": "assistant", "content": "a"}
    times = [10**9, 10**9, 10**12]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("at", pa.timestamp("s"))]))
    messages = pa.array([[turn | {"at": time}] for time in times], kind)
    table = pa.table({"text": text, "messages": messages})
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    texts = read_local(tmp_path, dataclasses.replace(make_corpus(("text",), remote_readers.read_text), kind="text"))
    assert [record.get("text") for record in texts] == ["before", None, "after"]
    assert texts[1]["malformed"] == "not UTF-8"
    conversations = read_local(tmp_path, make_corpus(("messages",)))
    assert [find_problem(record, "sft") for record in conversations] == [
        None,
        None,
        "a value that Python cannot hold",
    ]


BAD_MESSAGES = {
    "null among messages": ([None, ASKED], "message is null, not an object"),
    "number among messages": ([ASKED, 3], "message is int, not an object"),
    "text": ("Weather?", "no list in `messages`"),
    "number": (3, "no list in `messages`"),
    "object": ({"role": "user"}, "no list in `messages`"),
    "null": (None, "no list in `messages`"),
    "empty": ([], "no messages"),
    "no assistant": ([ASKED], "last message is not the assistant's"),
    "unhashable role": ([{"role": ["user"], "content": "q"}], "role is list, not a string"),
    "role is an object": ([{"role": {"name": "user"}, "content": "q"}], "role is dict, not a string"),
    "unknown role": ([ASKED, {"role": "narrator", "content": "q"}, ANSWER], "unknown role 'narrator'"),
    "no role": ([{"content": "q"}, ANSWER], "role is null, not a string"),
    "content is a number": (saying(7), "content is int, not text"),
    "content is an object": (saying({"a": 1}), "content part of kind 'None'"),
    "content is null": ([ASKED, {"role": "assistant", "content": None}], "text is null, not a string"),
    "no content": ([ASKED, {"role": "assistant", "parts": [{"text": "a"}]}], "text is null, not a string"),
    "image": (
        saying([{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "q"}]),
        "content part of kind 'image_url'",
    ),
    "anthropic call": (
        [ASKED, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}],
        "content part of kind 'tool_use'",
    ),
    "null part": (saying([None]), "content part is null, not text"),
    "text part without text": (saying([{"type": "text"}]), "text of a content part is null, not a string"),
    "unhashable kind": (saying([{"type": [], "text": "q"}]), "content part of kind '[]'"),
    "calls are a number": (calling(1), "tool calls are int, not a list"),
    "calls are prose": (calling("get_weather()"), "tool calls are text that is no JSON"),
    "call is null": (calling([None]), "tool call without a name"),
    "call without a name": (calling([{"arguments": {}}]), "tool call without a name"),
    "function is a number": (calling([{"function": 1}]), "tool call without a name"),
    "arguments are prose": (
        calling([{"name": "f", "arguments": "city is x"}]), "arguments of a tool call are text that is no JSON",
    ),
    "arguments are a list": (
        calling([{"name": "f", "arguments": ["x"]}]), "arguments of a tool call are list, not an object",
    ),
    "arguments under another name": (
        calling([{"name": "f", "kwargs": {"a": 1}}]), "tool call with unknown fields and no arguments",
    ),
    "infinite argument": (
        calling([{"name": "f", "arguments": {"a": float("inf")}}]), "tool call with a value that JSON does not have",
    ),
}  # fmt: skip
"""Messages that are no conversation to train on, and the reason."""


@pytest.mark.parametrize("form", BAD_MESSAGES)
def test_a_bad_row_is_set_aside_and_its_neighbours_are_read(tmp_path, form):
    messages, reason = BAD_MESSAGES[form]
    rows = [{"messages": messages} for messages in ([ASKED, ANSWER], messages, [ASKED, ANSWER])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_local(tmp_path, make_corpus(("messages",)))
    assert [find_problem(record, "sft") for record in records] == [None, reason, None]


LINES = {
    "huge integer": '{"text": "t", "n": %s}' % ("7" * 5000),
    "huge negative integer": '{"text": "t", "n": -%s}' % ("7" * 5000),
    "not a number": '{"text": "t", "n": NaN, "m": -Infinity, "e": 1e999}',
    "another column is called malformed": '{"text": "t", "malformed": false}',
    "another column is called excluded": '{"text": "t", "excluded": "no"}',
    "text twice": '{"text": "s", "text": "t"}',
}
"""Lines that can be read: their text is `t`."""


@pytest.mark.parametrize("line", LINES)
def test_what_stands_in_other_columns_does_no_harm(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f"{LINES[line]}\n" + '{"text": "after"}\n')
    corpus = dataclasses.replace(make_corpus(("text",), remote_readers.read_text), kind="text")
    assert read_local(tmp_path, corpus) == [{"text": "t"}, {"text": "after"}]


@pytest.mark.parametrize(
    "line", ("[" * 100_000, '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "null", "3", '"text"', "[]", "{", "}{")
)
def test_a_line_that_is_no_row_is_set_aside(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "before"}\n' + line + "\n" + '{"text": "after"}\n')
    corpus = dataclasses.replace(make_corpus(("text",), remote_readers.read_text), kind="text")
    records = read_local(tmp_path, corpus)
    assert [find_problem(record, "text") is None for record in records] == [True, False, True]


def walk(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside of a row."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from walk(child, (*path, key))


def replace_at(row: object, path: tuple, value: object) -> object:
    """Return a copy of a row with another value at a path."""
    if not path:
        return value
    changed = copy.deepcopy(row)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


JUNK = (None, 0, 1.5, True, "", "text", "{}", "[1]", [], [None], [[]], {}, {"a": None}, {"type": "image"})


@pytest.mark.parametrize("corpus", PUBLISHED_ROWS)
def test_no_value_at_any_place_of_a_row_ends_the_reader(tmp_path, corpus):
    row = PUBLISHED[corpus][0] if corpus in PUBLISHED else PUBLISHED_ROWS[corpus]
    changed = [replace_at(row, path, junk) for path in walk(row) for junk in JUNK]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed))
    entry = CATALOGUE[corpus]
    records = read_local(tmp_path, entry)
    assert len(records) == len(changed)
    for record in records:
        if "excluded" in record or find_problem(record, entry.kind):
            continue
        texts = [record["text"]] if entry.kind == "text" else [m["content"] for m in record["messages"]]
        assert all(isinstance(text, str) for text in texts)
        assert not any("None" in text or "True" in text for text in texts), "Python's form of a value was trained"


def test_arguments_that_arrow_read_as_times_are_set_aside(tmp_path):
    """Readers of JSON into Arrow take text such as 2024-01-01 for a time; what it was is lost."""
    arguments = {"day": datetime.datetime(2024, 1, 1)}
    calls = [{"name": "f", "arguments": arguments}]
    record = read_one(tmp_path, [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}], "a.parquet")
    assert find_problem(record, "sft") == "tool call with a value that JSON does not have"


def test_reasons_are_few(tmp_path):
    """A reason is counted: it holds no value of a row but the name of a role or kind, cut to a length."""
    rows = [{"messages": [{"role": f"r{'x' * 500}{i}", "content": "q"}]} for i in range(50)]
    write_rows(tmp_path / "a.jsonl", rows)
    records = read_local(tmp_path, make_corpus(("messages",)))
    assert len({find_problem(record, "sft") for record in records}) == 1


@pytest.mark.parametrize("prompt", ["", "-", " \n"])
def test_rows_whose_prompt_the_publisher_withholds_are_excluded_and_not_malformed(tmp_path, prompt):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": [turns[0] | {"content": "q"}, turns[1]]}]
    (tmp_path / "chat-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = CATALOGUE["nemotron-chat"]
    corpus = dataclasses.replace(entry, source=RemoteFiles(str(tmp_path), "*.jsonl", ("messages",)))
    withheld, given = corpus.read(Unit(corpus, str(tmp_path), 0, 0))
    assert withheld["excluded"] == "prompt withheld by the publisher"
    assert given == {"messages": rows[1]["messages"]}
