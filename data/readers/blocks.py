"""datatrove blocks of our own: read a corpus, read one rank's file, decide a document's split.

In every step of the pipeline rank r handles unit r of `data.catalogue.corpora.units`, so datatrove's statistics of a rank are the
statistics of one corpus (or of one shard of it), and completion markers name a piece of a corpus.
"""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.readers.base import BaseReader

from core.special_tokens import SPECIAL_TOKENS
from data.catalogue.corpus import RemoteFiles, Unit
from data.readers import remote_readers
from data.readers.instruction_readers import ROLES


def rank_file(rank: int) -> str:
    """Name of the file that holds a rank's documents between two steps."""
    return f"{rank:05d}.jsonl.zst"


def problem(record: dict, kind: str) -> str | None:
    """Why a record cannot be used, or None where it can."""
    if "malformed" in record:
        return record["malformed"]
    if kind == "text":
        return _text_problem(record.get("text"))
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no messages"
    for message in messages:
        if message.get("role") not in ROLES:
            return f"unknown role {message.get('role')!r}"
        if reason := _text_problem(message.get("content")):
            return reason
        if any(token in message["content"] for token in SPECIAL_TOKENS):
            return "special token inside a message"
    if messages[-1]["role"] != "assistant":
        return "last message is not the assistant's"
    return None


def _text_problem(text: object) -> str | None:
    if not isinstance(text, str):
        return f"text is {type(text).__name__}, not a string"
    if not text.strip():
        return "empty text"
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "lone surrogate"
    return None


class CorpusReader(BaseReader):
    """Reads unit `rank` as documents; rows that cannot be used go to `set_aside/malformed`, with the reason.

    Beside the documents it leaves `<read>/<rank>.json`: rows read, rows malformed, sha256 over the records read, and of
    remote files what each was (`data.readers.remote_readers.inputs`).
    A document of an sft corpus has its contents as text and the conversation in `metadata["messages"]`.
    """

    name = "corpus"

    def __init__(self, units: list[Unit], malformed: Path, read: Path):
        super().__init__()
        self.units = units
        self.malformed = malformed
        self.read = read

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        assert data is None and world_size == len(self.units)
        unit = self.units[rank]
        self.malformed.mkdir(parents=True, exist_ok=True)
        set_aside = self.malformed / f"{unit.corpus.name}.{unit.shard:05d}.jsonl"
        counts = {"read": 0, "malformed": 0}
        digest = hashlib.sha256()
        with set_aside.open("w", encoding="utf-8") as rejected:
            for index, record in enumerate(self._records(unit)):
                line = json.dumps(record, sort_keys=True, default=str)
                digest.update(line.encode())
                counts["read"] += 1
                reason = problem(record, unit.corpus.kind)
                if reason:
                    counts["malformed"] += 1
                    rejected.write(json.dumps({"row": index, "reason": reason, "record": line}) + "\n")
                    continue
                document = self._document(unit, record, index)
                self.update_doc_stats(document)
                yield document
        if counts["malformed"] == 0:
            set_aside.unlink()
        self.read.mkdir(parents=True, exist_ok=True)
        inputs = remote_readers.inputs(unit) if isinstance(unit.corpus.source, RemoteFiles) else []
        found = {**counts, "sha256": digest.hexdigest(), "inputs": inputs}
        (self.read / f"{rank:05d}.json").write_text(json.dumps(found))

    @staticmethod
    def _records(unit: Unit) -> Iterator[dict]:
        cap = unit.corpus.max_documents
        share = None if cap is None else -(-cap // unit.corpus.shards)
        return islice(unit.corpus.read(unit), share)

    @staticmethod
    def _document(unit: Unit, record: dict, index: int) -> Document:
        corpus = unit.corpus
        metadata = {"corpus": corpus.name, "domain": corpus.domain, "kind": corpus.kind, "style": corpus.style}
        if corpus.kind == "sft":
            metadata["messages"] = record["messages"]
            text = "\n".join(message["content"] for message in record["messages"])
        else:
            text = record["text"]
        return Document(text=text, id=f"{corpus.name}/{unit.shard}/{index}", metadata=metadata)


class RankReader(JsonlReader):
    """Reads the file that the same rank of an earlier step wrote; a rank that kept nothing wrote none."""

    name = "rank"

    def __init__(self, folder: Path):
        super().__init__(str(folder), add_file_path=False)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        assert data is None
        if self.data_folder.exists(rank_file(rank)):
            for document in self.read_files_shard([rank_file(rank)]):
                self.update_doc_stats(document)
                yield document


def split_of(text: str, splits: tuple[str, ...], seed: int, heldout_fraction: float, midtrain_fraction: float) -> str:
    """Which part a text belongs to, from its hash alone: `heldout` or one of `splits` (`Corpus.splits`).

    Two independent uniform numbers from one sha256: the first decides held-out, the second, where a corpus feeds both,
    pre-training or mid-training.
    """
    digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
    if int.from_bytes(digest[:8], "big") / 2**64 < heldout_fraction:
        return "heldout"
    if len(splits) == 1:
        return splits[0]
    return "midtrain" if int.from_bytes(digest[8:16], "big") / 2**64 < midtrain_fraction else "pretrain"


class SplitTagger(PipelineStep):
    """Writes `metadata["split"]`."""

    type = "✂️ - SPLIT"
    name = "by hash"

    def __init__(self, units: list[Unit], seed: int, heldout_fraction: float, midtrain_fraction: float):
        super().__init__()
        self.splits = [unit.corpus.splits for unit in units]
        self.seed = seed
        self.heldout_fraction = heldout_fraction
        self.midtrain_fraction = midtrain_fraction

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            split = split_of(document.text, self.splits[rank], self.seed, self.heldout_fraction, self.midtrain_fraction)
            document.metadata["split"] = split
            self.stat_update(split)
            yield document
