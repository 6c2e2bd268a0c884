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

from core.special_tokens import SPECIAL_TOKENS
from data import compat
from data.catalogue.corpus import RemoteFiles, Unit
from data.readers import remote_files
from data.readers.instruction_readers import ROLES

MAX_DOCUMENT_CHARS = 10_000_000
"""Largest number of characters of a document or conversation: three times the longest books. A block holds some copies
of the text and its words, about a gigabyte, and the tokenizer encodes it in one call."""
TOO_LARGE = f"longer than {MAX_DOCUMENT_CHARS:,} characters"


def rank_file(rank: int) -> str:
    """Return the name of the file that holds a rank's documents between two steps."""
    return f"{rank:05d}.jsonl.zst"


def find_problem(record: dict, kind: str) -> str | None:
    """Return why a record cannot be used, or None where it can.

    Args:
        record: what a corpus's reader yields (`Corpus.read`).
        kind: `text` or `sft`, which says the fields that the record must have.
    """
    if "malformed" in record:
        return record["malformed"]
    if kind == "text":
        return _find_text_problem(record.get("text"))
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        if message.get("role") not in ROLES:
            return f"unknown role {message.get('role')!r}"
        if reason := _find_text_problem(message.get("content")):
            return reason
        # Conversations are encoded after rendering, so a special token in a message would be taken as the real one.
        if any(token in message["content"] for token in SPECIAL_TOKENS):
            return "special token inside a message"
    if sum(len(message["content"]) for message in messages) > MAX_DOCUMENT_CHARS:
        return TOO_LARGE
    if messages[-1]["role"] != "assistant":
        return "last message is not the assistant's"
    return None


def _find_text_problem(text: object) -> str | None:
    if not isinstance(text, str):
        return f"text is {type(text).__name__}, not a string"
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

    Records that cannot be used are written to `<malformed>/<corpus>.<shard>.jsonl` with the reason.
    `<read>/<rank>.json` gets the number of records read and rejected, a SHA-256 over the records read, and the identity
    of each remote file (`data.readers.remote_files.list_inputs`).

    A document of an sft corpus has the contents of its messages as text and the conversation in `metadata["messages"]`.
    """

    name = "corpus"

    def __init__(self, units: list[Unit], malformed: Path, read: Path):
        super().__init__()
        self.units = units
        self.malformed = malformed
        self.read = read

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of unit `rank`."""
        assert data is None and world_size == len(self.units)
        unit = self.units[rank]
        self.malformed.mkdir(parents=True, exist_ok=True)
        rejected_path = self.malformed / f"{unit.corpus.name}.{unit.shard:05d}.jsonl"
        counts = {"read": 0, "malformed": 0}
        digest = hashlib.sha256()
        with rejected_path.open("w", encoding="utf-8") as rejected:
            for index, record in enumerate(self._records(unit)):
                line = json.dumps(record, sort_keys=True, default=str)
                digest.update(line.encode())
                counts["read"] += 1
                reason = find_problem(record, unit.corpus.kind)
                if reason:
                    counts["malformed"] += 1
                    rejected.write(json.dumps({"row": index, "reason": reason, "record": line}) + "\n")
                    continue
                document = self._make_document(unit, record, index)
                self.update_doc_stats(document)
                yield document
        if counts["malformed"] == 0:
            rejected_path.unlink()
        self.read.mkdir(parents=True, exist_ok=True)
        inputs = remote_files.list_inputs(unit) if isinstance(unit.corpus.source, RemoteFiles) else []
        summary = {**counts, "sha256": digest.hexdigest(), "inputs": inputs}
        (self.read / f"{rank:05d}.json").write_text(json.dumps(summary))

    @staticmethod
    def _records(unit: Unit) -> Iterator[dict]:
        """Yield the unit's records, at most its share of the corpus's cap (rounded up)."""
        cap = unit.corpus.max_documents
        share = None if cap is None else -(-cap // unit.corpus.shards)
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
        super().__init__(str(folder), add_file_path=False)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of the rank's file."""
        assert data is None
        for document in compat.read_jsonl_file(self, rank_file(rank)):
            self.update_doc_stats(document)
            yield document
