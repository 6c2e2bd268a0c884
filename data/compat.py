"""The only module of data/ that uses private or undocumented APIs (of datatrove and spaCy).

An upgrade of one of these libraries may change such an API without notice. tests/data/test_contracts.py tests each
function here and says what breaks. Subclasses of datatrove's public classes (PipelineStep, BaseFilter, BaseReader, ...)
that follow its documentation are not listed here.
"""

import importlib.metadata  # noqa: F401  datatrove's dependency check uses this submodule without importing it
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import ExactDedupFilter, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.filters import GopherRepetitionFilter, LanguageFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.gopher_repetition_filter import find_duplicates
from datatrove.pipeline.readers import JsonlReader
from datatrove.utils.lid import FastTextLID
from datatrove.utils.word_tokenizers import SpaCyTokenizer
from spacy.lang.lex_attrs import is_punct
from spacy.pipeline import Sentencizer

__all__ = ["find_duplicates", "is_punct"]

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

EXACT_FILTER_BLOCK: str = ExactDedupFilter.name
NEAR_FILTER_BLOCK: str = MinhashDedupFilter.name
FILTER_INPUT, FILTER_OUTPUT, FILTER_DROPPED = "total", "forwarded", "dropped"
"""Counters of every filter: documents that reach it, that pass it, and that it drops."""
FILTER_REASON_PREFIX = "dropped_"
"""Beginning of the counter of each reason for which a filter dropped documents."""

# --- datatrove's readers and filters ---


def read_jsonl_file(reader: JsonlReader, name: str) -> Iterator[Document]:
    """Yield the documents of one file of the reader's folder; nothing where the file does not exist."""
    if reader.data_folder.exists(name):
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
    block.output_folder = get_datafolder(str(folder))


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
