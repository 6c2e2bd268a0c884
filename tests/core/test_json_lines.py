"""Files of JSON lines: cutting them from their end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import json_lines
from core.json_lines import cut_last_lines, read_json_lines


def write(path, records, torn=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + torn)


@given(
    sizes=st.lists(st.integers(0, 40), max_size=12), first=st.integers(0, 13), block=st.integers(1, 64),
    torn=st.sampled_from(["", '{"step": 99, "te', "{", '{"step": 99}']),
)  # fmt: skip
def test_what_is_left_are_the_lines_before_a_step_whatever_the_blocks(sizes, first, block, torn, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    records = [{"step": step, "text": "ü" * size} for step, size in enumerate(sizes)]
    write(path, records, torn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "BLOCK_BYTES", block)
        cut_last_lines(path, lambda record: record["step"] >= first)
    assert path.read_text() == "".join(json.dumps(record) + "\n" for record in records[:first])
    assert list(read_json_lines(path)) == records[:first]


def test_only_the_end_is_read(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_bytes(b"not JSON at all\n" * 100_000)
    with path.open("a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in range(50))
    size = path.stat().st_size
    cut_last_lines(path, lambda record: record["step"] >= 48)
    assert size - path.stat().st_size == 2 * len('{"step": 48}\n')


def test_a_file_that_is_absent_has_no_records(tmp_path):
    assert list(read_json_lines(tmp_path / "none.jsonl")) == []
