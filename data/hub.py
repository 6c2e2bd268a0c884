"""The open corpora of the published recipe, as parquet or jsonl files on any fsspec address.

`hf://` needs the hub; a mirror is the same files under another address (`RemoteFiles.address`).
"""

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import fsspec
import pyarrow.parquet

if TYPE_CHECKING:
    from data.corpora import Unit

ROWS_PER_BATCH = 1024


def rows(unit: "Unit") -> Iterator[dict]:
    """Rows of this shard's files (every `shards`-th), as dictionaries; broken jsonl lines as malformed records.

    Raises:
        ValueError: no file matches.
    """
    source = unit.corpus.source
    fs, root = fsspec.core.url_to_fs(unit.location)
    files = sorted(fs.glob(f"{root.rstrip('/')}/{source.pattern}"))
    if not files:
        raise ValueError(
            f"corpora: {unit.corpus.name} finds no {source.pattern!r} under {unit.location}; check the address"
        )
    for path in files[unit.shard :: unit.corpus.shards]:
        if path.endswith(".parquet"):
            with fs.open(path) as file:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_PER_BATCH):
                    yield from batch.to_pylist()
        else:
            with fs.open(path, compression="infer") as file:
                yield from _json_lines(io.TextIOWrapper(file, encoding="utf-8", errors="replace"))


def _json_lines(file: io.TextIOWrapper) -> Iterator[dict]:
    for line in file:
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield {"malformed": f"json: {error.msg}", "raw": line}


def read_text(unit: "Unit", field: str = "text") -> Iterator[dict]:
    """Documents from one column."""
    for row in rows(unit):
        yield row if "malformed" in row else {"text": row.get(field)}


def read_pairs(unit: "Unit", question: str, answer: str) -> Iterator[dict]:
    """One question and one answer from two columns."""
    for row in rows(unit):
        yield (
            row
            if "malformed" in row
            else {
                "messages": [
                    {"role": "user", "content": row.get(question)},
                    {"role": "assistant", "content": row.get(answer)},
                ]
            }
        )


def read_messages(unit: "Unit", field: str = "messages") -> Iterator[dict]:
    """Conversations from a column of {role, content, tool_calls}; a turn that only calls functions is their JSON."""
    for row in rows(unit):
        yield row if "malformed" in row else {"messages": [_message(turn) for turn in row.get(field) or []]}


def read_prompted(unit: "Unit") -> Iterator[dict]:
    """Columns `input` (the messages so far) and `output` (the assistant's next)."""
    for row in rows(unit):
        if "malformed" in row or not isinstance(row.get("input"), list):
            yield {"malformed": "no list of messages in `input`", "raw": json.dumps(row)}
        else:
            answer = {"role": "assistant", "content": row.get("output")}
            yield {"messages": [*map(_message, row["input"]), answer]}


def _message(turn: dict) -> dict:
    content = turn.get("content")
    if not content and turn.get("tool_calls"):
        content = json.dumps([call["function"] for call in turn["tool_calls"]])
    return {"role": turn.get("role"), "content": content}


def entries(corpus: Callable, files: Callable) -> tuple:
    """Catalogue entries; the constructors come as arguments because `data.corpora` imports this module."""
    text = partial(corpus, kind="text", shards=64)
    sft = partial(corpus, kind="sft", style="conversation", shards=16)
    hf = "hf://datasets"
    nemotron = f"{hf}/nvidia/Nemotron-Post-Training-Dataset-v1"
    return (
        text(
            name="fineweb-edu", domain="web", style="prose", licence="ODC-BY-1.0",
            source=files(f"{hf}/HuggingFaceFW/fineweb-edu", "sample/350BT/*.parquet"), read=read_text,
            text_bytes=int(1.6e12),
        ),
        text(
            name="finemath", domain="math", style="documentation", licence="ODC-BY-1.0",
            source=files(f"{hf}/HuggingFaceTB/finemath", "finemath-3plus/*.parquet"), read=read_text,
            text_bytes=int(1.4e11),
        ),
        text(
            name="wikipedia", domain="knowledge", style="encyclopedia", licence="CC-BY-SA-3.0",
            source=files(f"{hf}/wikimedia/wikipedia", "20231101.en/*.parquet"), read=read_text, text_bytes=int(2e10),
        ),
        text(
            name="starcoder", domain="code", style="code", licence="each repository's own, permissive ones only",
            source=files(f"{hf}/bigcode/starcoderdata", "*/*.parquet"), read=partial(read_text, field="content"),
            text_bytes=int(7.8e11),
        ),
        text(
            name="pes2o", domain="science", style="documentation", licence="ODC-BY-1.0",
            source=files(f"{hf}/allenai/peS2o", "data/v2/train-*.json.gz"), read=read_text, text_bytes=int(1.8e11),
        ),
        sft(
            name="open-math-instruct-2", domain="math", licence="CC-BY-4.0",
            source=files(f"{hf}/nvidia/OpenMathInstruct-2", "data/train-*.parquet"),
            read=partial(read_pairs, question="problem", answer="generated_solution"), text_bytes=int(2.5e10),
        ),
        sft(
            name="open-code-instruct", domain="code", licence="CC-BY-4.0",
            source=files(f"{hf}/nvidia/OpenCodeInstruct", "data/train-*.parquet"),
            read=partial(read_pairs, question="input", answer="output"), text_bytes=int(1.5e10),
        ),
        sft(
            name="natural-reasoning", domain="reasoning", licence="CC-BY-NC-4.0 (non-commercial)",
            source=files(f"{hf}/facebook/natural_reasoning", "*.jsonl"),
            read=partial(read_pairs, question="question", answer="reference_answer"), text_bytes=int(1e9),
        ),
        sft(
            name="nemotron-chat", domain="chat", licence="CC-BY-4.0", source=files(nemotron, "data/chat-*.parquet"),
            read=read_messages, text_bytes=int(3.8e9),
        ),
        sft(
            name="nemotron-tools", domain="tool_use", licence="CC-BY-4.0",
            source=files(nemotron, "data/tool-*.parquet"), read=read_messages, text_bytes=int(6.4e9),
        ),
        sft(
            name="nemotron-stem", domain="science", licence="CC-BY-4.0", source=files(nemotron, "data/stem-*.parquet"),
            read=read_messages, text_bytes=int(3.3e11),
        ),
        sft(
            name="nemotron-safety", domain="safety", licence="CC-BY-4.0",
            source=files(f"{hf}/nvidia/Llama-Nemotron-Post-Training-Dataset", "SFT/safety/*.jsonl"), read=read_prompted,
            text_bytes=int(5e7),
        ),
    )  # fmt: skip
