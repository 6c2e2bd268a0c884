"""The last block of the pipeline: it encodes documents and writes them as MDS shards."""

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from streaming import MDSWriter

from core.atomic import atomic_write, remove
from data.catalogue.corpus import SHARDS_BY_KIND
from data.report import shard_statistics
from data.report.shard_statistics import ShardStatistics
from data.tokens import mds, tokenizer
from data.tokens.chat import Encoder

BATCH_CHARS = 1 << 20
"""Characters of a batch: so many that the calls into the tokenizer cost nothing, and few enough for memory."""


class ShardWriter(PipelineStep):
    """Tokenizes the documents of a rank and writes its part, `parts/<rank>/<destination>`.

    A part appears complete or not at all. It also holds the statistics of its shards
    (`data.report.shard_statistics.save`). A conversation whose first answer is longer than `max_conversation_tokens` is
    rejected and written to `<too_long>/<rank>.jsonl`.
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
        """Write the part of the rank."""
        # A rank has one core: the cores are divided between ranks, not used by threads inside of one.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        part = self.parts / f"{rank:05d}"
        # A rank that runs again was killed between its last rename and datatrove's completion marker.
        remove(part)
        with atomic_write(part) as partial:
            partial.mkdir()
            rejected = self._write_samples(data, partial)
            self._write_rejected(rejected, rank)

    def _write_samples(self, data: DocumentsPipeline, folder: Path) -> list[Document]:
        """Write the samples and their statistics below `folder`, and return the documents that were rejected."""
        encoder = load_encoder(self.tokenizer_folder, tokenizer.hash_tokenizer(self.tokenizer_folder))
        writers: dict[str, MDSWriter] = {}
        statistics: dict[str, ShardStatistics] = {}
        rejected = []
        for batch in _split_into_batches(data):
            with self.track_time():
                for document, sample in zip(batch, self._encode(encoder, batch), strict=True):
                    if sample is None:
                        rejected.append(document)
                        continue
                    target = mds.choose_destination(document.metadata)
                    if target not in writers:
                        writers[target] = mds.make_writer(folder / target, document.metadata["kind"], self.shard_bytes)
                        unigrams = _make_unigram_counts(target, len(encoder.tokenizer))
                        statistics[target] = ShardStatistics(unigrams=unigrams)
                    writers[target].write(sample)
                    statistics[target].add(document.metadata["corpus"], document.text, sample)
        for writer in writers.values():
            writer.finish()
        shard_statistics.save(statistics, folder)
        return rejected

    def _encode(self, encoder: Encoder, batch: list[Document]) -> Iterator[dict[str, np.ndarray] | None]:
        """Yield the batch's samples in order; None for a conversation that is too long."""
        texts = [document.text for document in batch if document.metadata["kind"] == "text"]
        chats = [document.metadata["messages"] for document in batch if document.metadata["kind"] == "sft"]
        documents = iter(encoder.encode_documents(texts))
        conversations = iter(encoder.encode_conversations(chats, self.max_conversation_tokens))
        for document in batch:
            if document.metadata["kind"] == "text":
                yield {"tokens": next(documents)}
            elif (conversation := next(conversations)) is None:
                yield None
            else:
                if conversation.shortened:
                    self.stat_update("shortened")
                yield {"tokens": conversation.tokens, "loss_mask": conversation.loss_mask}

    def _write_rejected(self, rejected: list[Document], rank: int) -> None:
        path = self.too_long / f"{rank:05d}.jsonl"
        path.unlink(missing_ok=True)
        if rejected:
            self.stat_update("too_long", value=len(rejected))
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"id": document.id, "messages": document.metadata["messages"]} for document in rejected]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@lru_cache(maxsize=1)
def load_encoder(folder: Path, sha256: str) -> Encoder:
    """Load the encoder of a tokenizer folder, once per process, because it takes a second.

    Args:
        sha256: `tokenizer.hash_tokenizer` of the folder. It is only part of the cache's key: Ray's processes may live
            longer than a folder keeps its content.
    """
    return Encoder(tokenizer.load(folder))


def _split_into_batches(documents: DocumentsPipeline) -> Iterator[list[Document]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _make_unigram_counts(target: str, vocab_size: int) -> np.ndarray | None:
    """Return zeros, int64 [vocab], where the manifest states an entropy: held-out data and conversations.

    It states none of the training text, whose counts would be most of the work; there the result is None.
    """
    text = tuple(f"shards/{folder}/" for folder in SHARDS_BY_KIND["text"])
    return None if target.startswith(text) else np.zeros(vocab_size, np.int64)
