"""Sets a document aside on which a block works too long, so that it cannot hold up a step of days.

A block runs its work on one document through `run_limited`. Where the work takes longer than MAX_SECONDS, the document
is marked and passes all later blocks of the step untouched. `SlowDocuments`, the last block before the step's output,
takes the marked ones out and counts them by block.

The limit is processor time and not wall-clock time: a busy machine sets no document aside.

A timer's signal interrupts Python code and searches of `re`, and so ftfy, the filters and spaCy, which calls `re`.
fastText, `regex` and tokenizers are one call into C or Rust each. The signal waits until such a call returns. So their
time is bounded by the size of a document (`data.readers.corpus_reader.MAX_DOCUMENT_CHARS`): they are linear
(benchmarks/linear_time.py).
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.filters.base_filter import BaseFilter

from data.report.set_aside import SetAside

MAX_SECONDS = 30.0
"""Processor time in seconds that one block may take for one document. The slowest block takes 9 s for the longest
document of ordinary text."""
REPEAT_SECONDS = 1.0
"""Time between two signals once the limit is over, for the case that a library swallows the first exception."""
MARK = "too_slow"
"""Key of a document's metadata with the name of the block that it was too slow for."""

Result = TypeVar("Result")


class TooSlow(BaseException):
    """A block has worked too long on one document.

    It is no Exception, so that no library takes it for one of its own.
    """


@contextmanager
def limit_time() -> Iterator[None]:
    """Raise TooSlow inside of the block when it has taken MAX_SECONDS of processor time.

    Only the main thread of a process gets signals. Workers of all executors run their tasks there.

    Raises:
        TooSlow: the block took too long.
    """
    assert threading.current_thread() is threading.main_thread(), "signals arrive in the main thread alone"
    before = signal.signal(signal.SIGPROF, _interrupt)
    try:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS, REPEAT_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def run_limited(document: Document, block: str, work: Callable[[], Result], otherwise: Result) -> Result:
    """Return the result of `work`, or `otherwise` where it takes too long; the document is then marked.

    A document that an earlier block marked is not worked on again.

    Args:
        block: name of the block, which is counted and written with the document.
    """
    if MARK in document.metadata:
        return otherwise
    try:
        with limit_time():
            return work()
    except TooSlow:
        document.metadata[MARK] = block
        return otherwise


class SlowDocuments(BaseFilter):
    """Drops the documents that are marked as too slow; the reason is the block.

    `<folder>/<label of the unit>.jsonl` gets samples of them (`data.report.set_aside.SetAside`).
    """

    name = "time limit"

    def __init__(self, folder: Path, labels: Sequence[str]):
        super().__init__()
        self.folder, self.labels = folder, labels

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents that no block was too slow for."""
        with SetAside(self.folder / f"{self.labels[rank]}.jsonl") as self._set_aside:
            yield from super().run(data, rank, world_size)

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Return True, or False and the name of the block."""
        if MARK not in doc.metadata:
            return True
        self._set_aside.add(f"too slow: {doc.metadata[MARK]}", doc.text, id=doc.id)
        return False, doc.metadata[MARK]
