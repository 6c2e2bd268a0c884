"""The last block of the pipeline: documents to tokens to MDS shards."""

import json
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from streaming import MDSWriter

from data.report import shard_statistics
from data.report.shard_statistics import Tally
from data.tokens import mds, tokenizer
from data.tokens.chat import Encoder

BATCH_CHARS = 1 << 20
"""Text encoded at once: enough that calls into the tokenizer cost nothing, little enough to hold."""


class ShardWriter(PipelineStep):
    """Tokenizes this rank's documents and writes `parts/<rank>/<destination>`, whole or not at all.

    Beside the parts it leaves what `data.report.shard_statistics` saves. A conversation whose first answer is longer than
    `max_conversation_tokens` goes to `too_long/<rank>.jsonl`.
    """

    type = "💽 - WRITER"
    name = "mds"

    def __init__(
        self, tokenizer_folder: Path, parts: Path, too_long: Path, shard_bytes: int, max_conversation_tokens: int
    ):
        super().__init__()
        self.tokenizer_folder = tokenizer_folder
        self.parts = parts
        self.too_long = too_long
        self.shard_bytes = shard_bytes
        self.max_conversation_tokens = max_conversation_tokens

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        # A rank is a core: the cores are shared out between ranks, not within one.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        part = self.parts / f"{rank:05d}"
        beside = self.parts / f"{rank:05d}.partial"
        for leftover in (part, beside):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        encoder = load_encoder(self.tokenizer_folder, tokenizer.sha256(self.tokenizer_folder))
        writers: dict[str, MDSWriter] = {}
        tallies: dict[str, Tally] = {}
        rejected = []
        for batch in _batches(data):
            with self.track_time():
                for document, sample in zip(batch, self._samples(encoder, batch), strict=True):
                    if sample is None:
                        rejected.append(document)
                        continue
                    target = mds.destination(document.metadata)
                    if target not in writers:
                        writers[target] = mds.writer(beside / target, document.metadata["kind"], self.shard_bytes)
                        tallies[target] = Tally(unigrams=_unigrams(target, len(encoder.tokenizer)))
                    writers[target].write(sample)
                    tallies[target].add(document.metadata["corpus"], document.text, sample)
        for writer in writers.values():
            writer.finish()
        shard_statistics.save(tallies, beside)
        self._set_aside(rejected, rank)
        beside.rename(part)

    def _samples(self, encoder: Encoder, batch: list[Document]) -> Iterator[dict[str, np.ndarray] | None]:
        """The batch's samples in order; None for a conversation that is too long."""
        texts = [document.text for document in batch if document.metadata["kind"] == "text"]
        chats = [document.metadata["messages"] for document in batch if document.metadata["kind"] == "sft"]
        documents = iter(encoder.documents(texts))
        conversations = iter(encoder.conversations(chats, self.max_conversation_tokens))
        for document in batch:
            if document.metadata["kind"] == "text":
                yield {"tokens": next(documents)}
            elif (conversation := next(conversations)) is None:
                yield None
            else:
                if conversation.shortened:
                    self.stat_update("shortened")
                yield {"tokens": conversation.tokens, "loss_mask": conversation.loss_mask}

    def _set_aside(self, rejected: list[Document], rank: int) -> None:
        path = self.too_long / f"{rank:05d}.jsonl"
        path.unlink(missing_ok=True)
        if rejected:
            self.stat_update("too_long", value=len(rejected))
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"id": document.id, "messages": document.metadata["messages"]} for document in rejected]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@lru_cache(maxsize=1)
def load_encoder(folder: Path, sha256: str) -> Encoder:
    """Loaded once a process, which takes a second; Ray's processes may outlive a folder's content, hence the hash."""
    return Encoder(tokenizer.load(folder))


def _batches(documents: DocumentsPipeline) -> Iterator[list[Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _unigrams(target: str, vocab_size: int) -> np.ndarray | None:
    """Counted where an entropy is asked for: held-out data and conversations, not the bulk of the text."""
    return None if target.startswith(("shards/pretrain", "shards/midtrain")) else np.zeros(vocab_size, np.int64)
