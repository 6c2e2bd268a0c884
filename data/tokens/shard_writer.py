"""The last block of the pipeline: it encodes documents and writes them as MDS shards."""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from streaming import MDSWriter

from core.atomic import atomic_write, remove
from core.marked_text import UnusableConversationError
from data.catalogue.corpus import SHARDS_BY_KIND
from data.report import shard_statistics
from data.report.set_aside import SetAside
from data.report.shard_statistics import ShardStatistics
from data.tokens import mds, tokenizer
from data.tokens.chat import TOO_LONG, Encoder
from data.tokens.tokenizer_files import hash_tokenizer_files

BATCH_CHARS = 1 << 20
"""Characters of a batch: so many that the calls into the tokenizer cost nothing, and few enough for memory."""
TOO_LONG_COUNTER = "too_long"
"""Counter of the conversations whose first answer does not fit."""
REFUSED_PREFIX = "refused_"
"""Beginning of the counter of each other reason for which conversations were set aside."""


class ShardWriter(PipelineStep):
    """Tokenizes the documents of a rank and writes its part, `parts/<rank>/<destination>`.

    A part appears complete or not at all. It also holds the statistics of its shards
    (`data.report.shard_statistics.save`). A conversation that cannot be encoded is set aside: counted by its reason,
    and the first ones of every reason written to `<set_aside>/<label of the unit>.jsonl`.
    """

    type = "💽 - WRITER"
    name = "mds"

    def __init__(
        self,
        tokenizer_folder: Path,
        parts: Path,
        set_aside: Path,
        labels: Sequence[str],
        shard_bytes: int,
        max_conversation_tokens: int,
    ):
        super().__init__()
        self.tokenizer_folder = tokenizer_folder
        self.parts = parts
        self.set_aside = set_aside
        self.labels = labels
        self.shard_bytes = shard_bytes
        self.max_conversation_tokens = max_conversation_tokens

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the part of the rank."""
        # A rank has one core: the cores are divided between ranks, not used by threads inside of one.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        part = self.parts / f"{rank:05d}"
        # A rank that runs again was killed between its last rename and datatrove's completion marker.
        remove(part)
        with atomic_write(part) as partial, SetAside(self.set_aside / f"{self.labels[rank]}.jsonl") as set_aside:
            partial.mkdir()
            self._write_samples(data, partial, set_aside)
        for reason, count in set_aside.counts.items():
            self.stat_update(TOO_LONG_COUNTER if reason == TOO_LONG else f"{REFUSED_PREFIX}{reason}", value=count)

    def _write_samples(self, data: DocumentsPipeline, folder: Path, set_aside: SetAside) -> None:
        """Write the samples and their statistics below `folder`."""
        encoder = load_encoder(self.tokenizer_folder, tuple(hash_tokenizer_files(str(self.tokenizer_folder)).items()))
        writers: dict[str, MDSWriter] = {}
        statistics: dict[str, ShardStatistics] = {}
        for batch in _split_into_batches(data):
            with self.track_time():
                for document, sample in self._encode(encoder, batch, set_aside):
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

    def _encode(
        self, encoder: Encoder, batch: list[Document], set_aside: SetAside
    ) -> Iterator[tuple[Document, dict[str, np.ndarray]]]:
        """Yield the batch's documents that can be encoded and their samples, in order."""
        texts = [document.text for document in batch if document.metadata["kind"] == "text"]
        encoded = iter(encoder.encode_documents(texts))
        for document in batch:
            if document.metadata["kind"] == "text":
                yield document, {"tokens": next(encoded)}
                continue
            messages = document.metadata["messages"]
            try:
                conversation = encoder.encode_conversation(messages, self.max_conversation_tokens)
            except UnusableConversationError as error:
                set_aside.add(str(error), json.dumps(messages), id=document.id)
                continue
            if conversation.shortened:
                self.stat_update("shortened")
            yield document, {"tokens": conversation.tokens, "loss_mask": conversation.loss_mask}


@lru_cache(maxsize=1)
def load_encoder(folder: Path, sha256: tuple[tuple[str, str], ...]) -> Encoder:
    """Load the encoder of a tokenizer folder, once per process, because it takes a second.

    Args:
        sha256: items of `hash_tokenizer_files`. They are only part of the cache's key: Ray's processes may live longer
            than a folder keeps its content.
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
