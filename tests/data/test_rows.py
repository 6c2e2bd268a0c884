"""Rows of public corpora in all their forms: read rightly, or set aside by reason; no row ends a step."""

import json
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RefusedInput
from data.readers.arrow_rows import read_batch
from data.readers.corpus_reader import find_problem
from data.readers.messages import convert_messages
from data.readers.rows import ExcludedRow, MalformedRow, convert_rows, parse_json
from data.report import malformed_limit
from data.report.set_aside import MAX_REASONS, OTHER, SAMPLE_CHARS, SAMPLES_PER_REASON, SetAside

CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALL_TEXT = '[{"name": "weather", "arguments": {"city": "Rome"}}]'
CALLS = {
    "OpenAI's form": [{"id": "1", "type": "function", "function": CALL}],
    "flat": [CALL],
    "one object": CALL,
    "one object with function": {"type": "function", "function": CALL},
    "JSON text": json.dumps([CALL]),
    "JSON text of one object": json.dumps(CALL),
    "a list of JSON texts": [json.dumps(CALL)],
    "function as JSON text": [{"function": json.dumps(CALL)}],
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_in_every_form_give_the_same_text(form):
    turn = {"role": "assistant", "content": None, "tool_calls": CALLS[form]}
    assert convert_messages([{"role": "user", "content": "q"}, turn], "messages")[-1]["content"] == CALL_TEXT
    assert (
        convert_messages([turn | {"content": "Let me look."}], "messages")[0]["content"] == f"Let me look.\n{CALL_TEXT}"
    )


def test_the_older_function_call_is_read_and_its_arguments_are_parsed():
    turn = {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    assert convert_messages([turn], "messages")[0]["content"] == '[{"name": "f", "arguments": {"a": 1}}]'


def test_parts_of_text_are_joined_also_beside_calls():
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "warm."}, " Bye."]
    turn = {"role": "assistant", "content": parts, "tool_calls": [CALL]}
    user = {"role": "user", "content": [{"type": "input_text", "text": "q"}]}
    assert [m["content"] for m in convert_messages([user, turn], "messages")] == ["q", f"It is warm. Bye.\n{CALL_TEXT}"]


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"), ("User", "user"), ("gpt", "assistant"), ("model", "assistant"), ("developer", "system"),
        ("function", "tool"), ("ipython", "tool"), ("observation", "tool"), ("tool_response", "tool"),
        (" tool ", "tool"),
        ("function_call", "assistant"),
    ],
)  # fmt: skip
def test_speakers_of_public_corpora_have_roles(speaker, role):
    messages = [{"from": speaker, "value": "x"}, {"from": "gpt", "value": "a"}]
    assert convert_messages(messages, "conversations")[0] == {"role": role, "content": "x"}


ANSWER = {"role": "assistant", "content": "a"}
MALFORMED = [
    ([None, ANSWER], "message is null, not an object"),
    (["q", ANSWER], "message is str, not an object"),
    (None, "no list in `messages`"),
    ("hello", "no list in `messages`"),
    ({"a": 1}, "no list in `messages`"),
    ([{"role": ["user"], "content": "q"}], "role is list, not a string"),
    ([{"content": "q"}], "role is null, not a string"),
    ([{"role": "critic", "content": "q"}], "unknown role 'critic'"),
    ([{"role": "user", "content": 3}], "content is int, not text"),
    ([{"role": "user", "content": [3]}], "content part is int, not text"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content part of kind 'image_url'"),
    ([{"role": "user", "content": [{"type": "text", "text": None}]}], "text of a content part is null, not a string"),
    ([ANSWER | {"tool_calls": [{"arguments": {}}]}], "tool call without a name"),
    ([ANSWER | {"tool_calls": [None]}], "tool call without a name"),
    ([ANSWER | {"tool_calls": 7}], "tool calls are int, not a list"),
    ([ANSWER | {"tool_calls": "call f"}], "tool calls are text that is no JSON"),
]


@pytest.mark.parametrize(("messages", "reason"), MALFORMED)
def test_a_conversation_that_cannot_be_used_is_named_by_its_reason(messages, reason):
    (record,) = convert_rows(
        [{"messages": messages}], lambda row: {"messages": convert_messages(row["messages"], "messages")}
    )
    assert record["malformed"] == reason
    assert find_problem(record, "sft") == reason
    assert json.loads(record["raw"]) == {"messages": messages}


def test_what_follows_the_last_answer_and_empty_system_messages_are_left_out():
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "q"},
        ANSWER,
        {"role": "user", "content": "?"},
    ]
    assert convert_messages(messages, "messages") == messages[1:3]
    unanswered = {"messages": convert_messages(messages[1:2], "messages")}
    assert find_problem(unanswered, "sft") == "last message is not the assistant's"


def test_messages_as_json_text_and_as_a_struct_of_lists_are_read():
    messages = [{"role": "user", "content": "q"}, ANSWER]
    assert convert_messages(json.dumps(messages), "messages") == messages
    assert convert_messages({"from": ["human", "gpt"], "value": ["q", "a"]}, "conversations") == messages


FIELDS = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text"]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(FIELDS),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(JSON_VALUES)
def test_no_row_raises_and_every_record_is_usable_or_has_a_reason(value):
    rows = [value, {"messages": value}, {"messages": [value, ANSWER]}]
    for record in convert_rows(rows, lambda row: {"messages": convert_messages(row.get("messages"), "messages")}):
        reason = find_problem(record, "sft")
        assert reason is None or (isinstance(reason, str) and len(reason) < 120)
        if reason is None:
            assert all(isinstance(message["content"], str) for message in record["messages"])


def test_an_unforeseen_form_sets_aside_its_row_alone():
    def convert(row):
        if row["n"] == 1:
            raise ExcludedRow("a label")
        if row["n"] == 2:
            raise MalformedRow("a reason")
        return {"text": "x" * row["length"]}

    rows = [{"n": 0, "length": 1}, {"n": 1}, {"n": 2}, {"n": 0, "length": None}, 5, {"n": 0, "length": 2}]
    records = list(convert_rows(rows, convert))
    assert records[0] == {"text": "x"} and records[5] == {"text": "xx"}
    assert records[1] == {"excluded": "a label", "raw": '{"n": 1}'}
    assert records[2] == {"malformed": "a reason", "raw": '{"n": 2}'}
    assert records[3]["malformed"] == "unforeseen form (TypeError)"
    assert records[4]["malformed"] == "row is int, not an object"


def test_json_with_huge_integers_and_deep_nesting_is_read_or_marked():
    assert parse_json('{"id": ' + "7" * 5_000 + ', "text": "a"}')["text"] == "a"
    assert parse_json("-" + "7" * 4299) == -int("7" * 4299)
    assert parse_json("[" * 200_000)["malformed"] == "json: nested too deeply"
    assert parse_json('{"a": ')["malformed"].startswith("json: ")


def test_nulls_that_a_schema_adds_are_dropped_and_those_of_maps_and_lists_stay():
    calls = [{"name": "f", "arguments": {"city": "Rome"}}, {"name": "g", "arguments": {"day": 3, "tags": [None, "x"]}}]
    rows = [
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "user", "content": "q"}],
            "id": None,
        }
    ]
    batch = pa.RecordBatch.from_pylist(rows)
    assert batch.to_pylist()[0]["messages"][0]["tool_calls"][0]["arguments"] == {
        "city": "Rome",
        "day": None,
        "tags": None,
    }
    (read,) = read_batch(batch)
    assert read["messages"] == [{"role": "assistant", "tool_calls": calls}, {"role": "user", "content": "q"}]
    assert read["id"] is None
    kind = pa.map_(pa.string(), pa.string())
    mapped = pa.record_batch([pa.array([[("a", None), ("b", "1")]], kind)], names=["m"])
    assert read_batch(mapped) == [{"m": {"a": None, "b": "1"}}]


def test_set_aside_counts_every_row_and_keeps_ten_samples_a_reason(tmp_path):
    path = tmp_path / "set_aside" / "a.jsonl"
    with SetAside(path) as set_aside:
        for number in range(25):
            set_aside.add("empty", "x" * (SAMPLE_CHARS + 5), row=number)
        set_aside.add("surrogate", "\ud800")
        for number in range(MAX_REASONS):
            set_aside.add(f"reason {number}", "")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert set_aside.counts["empty"] == 25 and set_aside.counts.total() == 26 + MAX_REASONS
    assert set_aside.counts[OTHER] == 2 and len(set_aside.counts) == MAX_REASONS + 1
    kept = [line for line in lines if line["reason"] == "empty"]
    assert [line["row"] for line in kept] == list(range(SAMPLES_PER_REASON))
    assert {len(line["sample"]) for line in kept} == {SAMPLE_CHARS}
    assert {"reason": "surrogate", "sample": "\ud800"} in lines
    with SetAside(tmp_path / "none.jsonl"):
        pass
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("malformed", "read", "share", "stops"),
    [(10, 20, 0.01, False), (11, 20, 0.01, True), (11, 1_100, 0.01, False), (12, 1_100, 0.01, True),
     (1, 10**6, 0, True),
     (0, 10, 0, False), (900, 1000, 1, False)],
)  # fmt: skip
def test_more_than_the_share_stops_with_the_reasons(tmp_path, malformed, read, share, stops):
    reasons = Counter({"no text": malformed})
    if not stops:
        malformed_limit.check_corpora({"web": (read, reasons)}, share, tmp_path)
        return
    with pytest.raises(
        RefusedInput, match=rf"corpus web: {malformed} of .* \(no text: {malformed}\); .*--data.max-malf"
    ):
        malformed_limit.check_corpora({"web": (read, reasons)}, share, tmp_path)


def test_a_unit_with_a_wrong_column_stops_early(tmp_path):
    with SetAside(tmp_path / "a.jsonl") as malformed:
        for read in range(1, malformed_limit.EARLY_ROWS):
            malformed.add("no text", "")
            malformed_limit.check_unit("web", read, malformed, 0.01)
        malformed.add("no text", "")
        with pytest.raises(RefusedInput, match="1,000 of 1,000 rows"):
            malformed_limit.check_unit("web", malformed_limit.EARLY_ROWS, malformed, 0.01)
        malformed_limit.check_unit("web", malformed_limit.EARLY_ROWS, malformed, 1)
