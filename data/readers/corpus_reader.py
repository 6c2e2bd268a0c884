"""The two readers of the pipeline: one unit of a corpus in the first step, the file of one rank in the later steps.

In every step, rank r handles unit r of `data.catalogue.corpora.list_units`. So datatrove's statistics of a rank are the
statistics of one corpus (or of one shard of it), and a completion marker names a piece of a corpus.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseReader

from data import compat
from data.catalogue.corpus import RemoteFiles, Unit
from data.readers import remote_files
from data.readers.messages import ROLES
from data.readers.rows import describe_type, dump_row, quote_name
from data.report import malformed_limit as limit
from data.report.set_aside import SetAside

MAX_DOCUMENT_CHARS = 10_000_000
"""Largest number of characters of a document or conversation: three times the longest books. A block holds some copies
of the text and its words, about a gigabyte, and the tokenizer encodes it in one call."""
TOO_LARGE = f"longer than {MAX_DOCUMENT_CHARS:,} characters"


def find_problem(record: dict, kind: str) -> str | None:
    """Return why a record cannot be used, or None where it can.

    Args:
        record: what a corpus's reader yields (`Corpus.read`).
        kind: `text` or `sft`, which says the fields that the record must have.
    """
    for marker in ("malformed", "excluded"):
        if marker in record:
            return record[marker]
    if kind == "text":
        return _find_text_problem(record.get("text"))
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        if message.get("role") not in ROLES:
            return f"unknown role {quote_name(message.get('role'))}"
        # A function may return nothing.
        if message["role"] == "tool" and message.get("content") == "":
            continue
        if reason := _find_text_problem(message.get("content")):
            return reason
    if sum(len(message["content"]) for message in messages) > MAX_DOCUMENT_CHARS:
        return TOO_LARGE
    if messages[-1]["role"] != "assistant":
        return "last message is not the assistant's"
    return None


def _find_text_problem(text: object) -> str | None:
    if not isinstance(text, str):
        return f"text is {describe_type(text)}, not a string"
    if len(text) > MAX_DOCUMENT_CHARS:
        return TOO_LARGE
    if not text.strip():
        return "empty text"
    # UTF-8 cannot encode a lone surrogate: every later step would fail on it.
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "lone surrogate"
    return None


class CorpusReader(BaseReader):
    """Reads unit `rank` as documents.

    Records that cannot be used are counted by reason, and samples of them go to `<malformed>/<corpus>.<shard>.jsonl`
    (`data.report.set_aside.SetAside`); excluded ones go to `<excluded>` in the same way. `<read>/<rank>.json` gets the
    counts, a SHA-256 over the records read, and the identity of each remote file
    (`data.readers.remote_files.list_inputs`).

    A document of an sft corpus has the contents of its messages as text and the conversation in `metadata["messages"]`.
    """

    name = "corpus"

    def __init__(self, units: list[Unit], set_aside: Path, read: Path, max_malformed_share: float):
        super().__init__()
        self.units = units
        self.set_aside = set_aside
        self.read = read
        self.max_malformed_share = max_malformed_share

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of unit `rank`.

        Raises:
            RefusedInput: most of the unit's rows are malformed, as they are where a column has another name.
        """
        assert data is None and world_size == len(self.units)
        unit = self.units[rank]
        digest = hashlib.sha256()
        rows = 0
        name = f"{unit.corpus.name}.{unit.shard:05d}.jsonl"
        with (
            SetAside(self.set_aside / "malformed" / name) as malformed,
            SetAside(self.set_aside / "excluded" / name) as excluded,
        ):
            for index, record in enumerate(self._records(unit)):
                digest.update(json.dumps(record, sort_keys=True, default=str).encode())
                rows += 1
                if "excluded" in record:
                    excluded.add(record["excluded"], record["raw"], row=index)
                elif reason := find_problem(record, unit.corpus.kind):
                    malformed.add(reason, record["raw"] if "malformed" in record else dump_row(record), row=index)
                    limit.check_unit(unit.corpus.name, rows, malformed, self.max_malformed_share)
                else:
                    document = self._make_document(unit, record, index)
                    self.update_doc_stats(document)
                    yield document
        self.read.mkdir(parents=True, exist_ok=True)
        inputs = remote_files.list_inputs(unit) if isinstance(unit.corpus.source, RemoteFiles) else []
        summary = {
            "read": rows, "malformed": malformed.counts, "excluded": excluded.counts, "sha256": digest.hexdigest(),
            "inputs": inputs,
        }  # fmt: skip
        (self.read / f"{rank:05d}.json").write_text(json.dumps(summary))

    @staticmethod
    def _records(unit: Unit) -> Iterator[dict]:
        """Yield the unit's records, at most its share of the corpus's cap (rounded up)."""
        cap = unit.corpus.max_documents
        share = None if cap is None else -(-cap // unit.parts)
        return islice(unit.corpus.read(unit), share)

    @staticmethod
    def _make_document(unit: Unit, record: dict, index: int) -> Document:
        corpus = unit.corpus
        metadata = {"corpus": corpus.name, "domain": corpus.domain, "kind": corpus.kind, "style": corpus.style}
        if corpus.kind == "sft":
            metadata["messages"] = record["messages"]
            text = "\n".join(message["content"] for message in record["messages"])
        else:
            text = record["text"]
        return Document(text=text, id=f"{corpus.name}/{unit.shard}/{index}", metadata=metadata)


class RankReader(JsonlReader):
    """Reads the file that the same rank of an earlier step wrote; a rank that kept no document wrote no file."""

    name = "rank"

    def __init__(self, folder: Path):
        super().__init__(compat.LocalFolder(folder), add_file_path=False)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of the rank's file."""
        assert data is None
        for document in compat.read_jsonl_file(self, compat.rank_file(rank)):
            self.update_doc_stats(document)
            yield document
