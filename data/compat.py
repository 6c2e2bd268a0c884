"""The only module of data/ that uses private or undocumented APIs (of datatrove, ftfy and spaCy).

An upgrade of one of these libraries may change such an API without notice. tests/data/test_contracts.py tests each
function here and says what breaks. Subclasses of datatrove's public classes (PipelineStep, BaseFilter, BaseReader, ...)
that follow its documentation are not listed here.
"""

import glob
import importlib.metadata  # noqa: F401  datatrove's dependency check uses this submodule without importing it
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.io import DataFolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.filters import GopherRepetitionFilter, LanguageFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.gopher_repetition_filter import find_duplicates
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.utils.lid import FastTextLID
from datatrove.utils.word_tokenizers import SpaCyTokenizer
from fsspec.implementations.local import LocalFileSystem
from ftfy.chardata import CONTROL_CHARS
from spacy.lang.lex_attrs import is_punct
from spacy.pipeline import Sentencizer

from core.errors import DamagedData

__all__ = ["find_duplicates", "is_punct"]

# --- Folders ---


class LocalFolder(DataFolder):
    """A folder of this machine whose path is a name and nothing else.

    datatrove's own DataFolder reads a path as an address (`a::b`, `file:x`, `s3:x`), and lists files by a pattern of
    which the path is a part. Below a folder `x [v1]` it finds no file, and its blocks take that for nothing to do. So
    every folder that a block of datatrove gets is one of these.
    """

    def __init__(self, path: str | Path):
        # Only an absolute path is safe: fsspec reads a relative one as an address, and expands a tilde.
        super().__init__(os.path.abspath(path), fs=LocalFileSystem())

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> dict[str, dict]:
        """Return name relative to the folder -> fsspec's description of each file that matches a pattern.

        Only the pattern is one. datatrove passes `detail=True`, and patterns without `**`, whose depth is their own.
        """
        found = glob.glob(path, root_dir=self.path, include_hidden=True)
        return {name: self.info(name) for name in sorted(found)}


# --- datatrove's executor and the files it keeps in its logging folder ---


def run_rank(executor: LocalPipelineExecutor, rank: int) -> None:
    """Run the pipeline of one rank in this process, write its statistics and mark it completed; raises its exception.

    datatrove only runs ranks from its own `run` methods, which this program does not use (data/execution.py).
    """
    # datatrove logs to the console where local_rank is 0.
    executor._run_for_rank(rank, local_rank=1)


def list_incomplete_ranks(executor: LocalPipelineExecutor) -> list[int]:
    """Return the ranks without a completion marker, in order."""
    return executor.get_incomplete_ranks()


def count_completed_ranks(logging_dir: Path) -> int:
    """Return the number of completion markers below an executor's logging folder."""
    return len(list(logging_dir.glob("completions/*")))


def forget_completed_rank(logging_dir: Path, rank: int) -> None:
    """Remove a rank's completion marker, so that the next run of its step runs it again."""
    (logging_dir / "completions" / f"{rank:05d}").unlink(missing_ok=True)


def read_rank_statistics(logging_dir: Path, rank: int) -> list[tuple[str, Counter]]:
    """Return (block name, counters) of every block that a completed rank ran, in order.

    The file states a block as "type: name", and a counter as a number or as {"total": ..., "mean": ...}.
    """
    blocks = json.loads((logging_dir / "stats" / f"{rank:05d}.json").read_text())
    return [
        (
            block["name"].rpartition(": ")[2],
            Counter(
                {key: value["total"] if isinstance(value, dict) else value for key, value in block["stats"].items()}
            ),
        )
        for block in blocks
    ]


# --- Names that datatrove gives blocks and counters in its statistics ---

NEAR_FILTER_BLOCK: str = MinhashDedupFilter.name
FILTER_INPUT, FILTER_OUTPUT, FILTER_DROPPED = "total", "forwarded", "dropped"
"""Counters of every filter: documents that reach it, that pass it, and that it drops."""
FILTER_REASON_PREFIX = "dropped_"
"""Beginning of the counter of each reason for which a filter dropped documents."""

# --- datatrove's readers and filters ---


def rank_file(rank: int) -> str:
    """Return the name of the file that holds a rank's documents between two steps."""
    return f"{rank:05d}.jsonl.zst"


def read_jsonl_file(reader: JsonlReader, name: str) -> Iterator[Document]:
    """Yield the documents of one file of the reader's folder; nothing where the file does not exist.

    Raises:
        DamagedData: the file is empty, as a later step leaves one that it has read.
    """
    if reader.data_folder.exists(name):
        if not reader.data_folder.size(name):
            raise DamagedData(
                f"{reader.data_folder.path}/{name} is empty: a later step has read it, and this one has lost its "
                "completion marker; move the folder `work` away, and run again"
            )
        yield from reader.read_files_shard([name])


def read_filter_parameters(block: BaseFilter) -> dict:
    """Return name -> value of the numbers, strings and lists that a filter was made with, its attributes."""
    parameters = {name: value for name, value in vars(block).items() if isinstance(value, int | float | str | list)}
    return {name: value for name, value in sorted(parameters.items()) if not name.startswith("_")}


class RepetitionRules(NamedTuple):
    """Separators and limits of datatrove's Gopher repetition filter; None switches a limit off."""

    paragraph_separator: re.Pattern
    line_separator: re.Pattern
    paragraphs: float | None
    """Largest share of the paragraphs that may repeat an earlier one."""
    paragraph_chars: float | None
    """Largest share of the characters that may be in such paragraphs."""
    lines: float | None
    """Largest share of the lines that may repeat an earlier one."""
    line_chars: float | None
    """Largest share of the characters that may be in such lines."""
    top_n_grams: tuple[tuple[int, float], ...]
    """Pairs of n and the largest share of the characters that may be in the most frequent n-gram."""
    repeated_n_grams: tuple[tuple[int, float], ...]
    """Pairs of n and the largest share of the characters that may be in n-grams that repeat an earlier one."""


def read_repetition_rules(block: GopherRepetitionFilter) -> RepetitionRules:
    """Return the limits that a repetition filter was made with."""
    return RepetitionRules(
        paragraph_separator=block.paragraph_exp,
        line_separator=block._line_splitter,
        paragraphs=block.dup_para_frac,
        paragraph_chars=block.dup_para_char_frac,
        lines=block.dup_line_frac,
        line_chars=block.dup_line_char_frac,
        top_n_grams=block.top_n_grams,
        repeated_n_grams=block.dup_n_grams,
    )


def bound_email_pattern(block: PIIFormatter) -> None:
    """Let a PII formatter's search for e-mail addresses take linear time.

    datatrove's pattern tries the rest of a run such as "a-a-a-..." again from every boundary of a word. Here the parts
    of an address before its @ have at most 64 characters, as in RFC 5321, and there are at most 11 of them.
    """
    pattern = block.emails_replacer.regex.pattern
    part = pattern[len(r"\b") : pattern.index("+(?:")]
    start, bounded = rf"\b{part}+(?:\.{part}+)*@", rf"\b{part}{{1,64}}(?:\.{part}{{1,64}}){{0,10}}@"
    assert pattern.startswith(start), f"datatrove searches for e-mail addresses in another way: {pattern}"
    block.emails_replacer.regex = re.compile(bounded + pattern.removeprefix(start))


_CONTROLS = re.escape("".join(map(chr, CONTROL_CHARS)))
_MAY_BE_BROKEN = re.compile(rf"[&\r\x80-\x9f\u2028\u2029\ud800-\udfff{_CONTROLS}ÂÃŒœ]|[^\x00-\x7f]{{2}}")


def may_be_broken(text: str) -> bool:
    """Return whether ftfy may change a text, with the options of `data.filters.quality.TextRepair`.

    It changes entities (&), line breaks, escapes and control characters, surrogates, and text whose encoding looks
    wrong: its patterns for that need two characters in a row that are not ASCII, or a C1 control character, Â, Ã, Œ, œ.
    """
    return _MAY_BE_BROKEN.search(text) is not None


class LocalLanguageClassifier(FastTextLID):
    """datatrove's fastText language classifier on a model file of this machine, in place of its download."""

    def __init__(self, model_file: Path, languages: list[str]):
        # The filter's threshold is above one half, so only the likeliest language can pass.
        super().__init__(languages, k=1)
        self._model: Any
        self.model_file = model_file

    @property
    def model(self) -> Any:
        """The fastText model, loaded on first use: it cannot be pickled and sent to a worker."""
        if self._model is None:
            import fasttext

            self._model = fasttext.load_model(str(self.model_file))
        return self._model


def set_language_classifier(block: LanguageFilter, classifier: FastTextLID) -> None:
    """Replace the classifier of a language filter, which datatrove would download on first use."""
    block.model = classifier


def set_signature_folder(block: MinhashDedupSignature, folder: Path) -> None:
    """Let a MinHash signature block write below another folder than it was made with."""
    block.output_folder = LocalFolder(folder)


def share_statistics(block: PipelineStep, owner: PipelineStep) -> None:
    """Let `block` count into the statistics of `owner`, where the executor only knows `owner`."""
    block.stats = owner.stats


# --- spaCy, as datatrove uses it ---

UNTOKENIZABLE = "IS_ALPHA"
"""A word on which spaCy's tokenizer may fail. datatrove deletes it from a text that failed, this program from all."""
SENTENCE_ENDS = frozenset(Sentencizer.default_punct_chars)
"""Punctuation after which spaCy's sentencizer, and so datatrove, begins a new sentence."""


def tokenize_lines(tokenizer: SpaCyTokenizer, lines: list[str]) -> list[list[str]]:
    """Return the words of each line by spaCy's rules; a line holds no white space and is not empty.

    One call of spaCy for all lines: it makes a token of each line break, so no word crosses two lines. The memory zone
    frees what spaCy would otherwise remember of every word for ever.
    """
    text = "\n".join(lines)
    nlp = tokenizer.tokenizer
    nlp.max_length = len(text) + 1
    found: list[list[str]] = [[]]
    with nlp.memory_zone():
        for token in nlp.make_doc(text):
            if token.is_space:
                found.append([])
            else:
                found[-1].append(token.text)
    assert len(found) == max(1, len(lines))
    return found[: len(lines)]
