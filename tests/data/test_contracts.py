"""The private and undocumented APIs of datatrove, ftfy, spaCy and tokenizers that data/compat.py relies on.

The docstring of each test names what breaks when it fails.
"""

import pickle
from pathlib import Path

import numpy as np
import pytest
import xxhash
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.io import get_datafolder
from datatrove.pipeline.dedup import MinhashDedupCluster
from datatrove.pipeline.filters import (
    C4QualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LambdaFilter,
    LanguageFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils import text as datatrove_text
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_word_tokenizer

from data import compat
from data.filters import dedup, near_pairs
from data.filters.exact_dedup import ExactFilter
from data.filters.spacy_cache import EnglishWords


def make_documents() -> list[Document]:
    return [Document(text=text, id=text) for text in ("keep", "short", "keep too", "odd")]


def judge(document: Document) -> bool | tuple[bool, str]:
    return document.text.startswith("keep") or (False, document.text)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[LocalPipelineExecutor, Path]:
    """An executor of two ranks of which rank 0 was run."""
    folder = tmp_path_factory.mktemp("executor")
    pipeline = [make_documents(), LambdaFilter(judge), JsonlWriter(str(folder / "out"))]
    executor = LocalPipelineExecutor(pipeline, tasks=2, logging_dir=str(folder / "logs"))
    compat.run_rank(executor, 0)
    return executor, folder / "logs"


def test_a_rank_runs_alone_and_leaves_a_completion_marker(executed):
    """Broken: data/execution.py cannot run ranks, and a resumed step repeats or skips them; progress is not counted."""
    executor, logs = executed
    assert compat.list_incomplete_ranks(executor) == [1]
    assert compat.count_completed_ranks(logs) == 1
    assert (logs / "logs").is_dir()  # named in the message of a failed step


def test_a_failing_rank_raises_and_is_not_completed(tmp_path):
    """Broken: a failed task would count as completed, and its documents would be missing without an error."""

    def fail(document: Document) -> bool:
        raise OSError("disk is full")

    executor = LocalPipelineExecutor([make_documents(), LambdaFilter(fail)], tasks=1, logging_dir=str(tmp_path))
    with pytest.raises(OSError, match="disk is full"):
        compat.run_rank(executor, 0)
    assert compat.list_incomplete_ranks(executor) == [0]


def test_a_rank_whose_marker_is_removed_is_run_again(tmp_path):
    """Broken: a corpus with too many malformed rows is not read again after its files were corrected."""
    pipeline = [make_documents(), JsonlWriter(str(tmp_path / "out"))]
    executor = LocalPipelineExecutor(pipeline, tasks=2, logging_dir=str(tmp_path / "logs"))
    for rank in (0, 1):
        compat.run_rank(executor, rank)
    compat.forget_completed_rank(tmp_path / "logs", 1)
    compat.forget_completed_rank(tmp_path / "logs", 7)  # nothing to forget
    assert compat.list_incomplete_ranks(executor) == [1]


def test_an_executor_is_pickled_with_its_blocks(executed):
    """Broken: ranks cannot be sent to worker processes, Ray tasks or Slurm jobs."""
    executor, _ = executed
    step = ExactFilter(Path("folder"), 1, 1)
    copy = pickle.loads(
        pickle.dumps(LocalPipelineExecutor([step], tasks=3, logging_dir=str(executor.logging_dir.path)))
    )
    assert copy.world_size == 3 and str(copy.pipeline[0]) == str(step)


def test_statistics_name_blocks_and_count_documents(executed):
    """Broken: data_manifest.json and the statistics page count nothing (data/report/data_manifest.py)."""
    _, logs = executed
    blocks = dict(compat.read_rank_statistics(logs, 0))
    counters = blocks[LambdaFilter.name.rpartition(": ")[2]]
    assert counters[compat.FILTER_INPUT] == 4
    assert counters[compat.FILTER_OUTPUT] == 2
    assert counters[compat.FILTER_DROPPED] == 2
    assert counters[f"{compat.FILTER_REASON_PREFIX}odd"] == 1


def test_deduplication_filters_have_names_of_their_own():
    """Broken: the manifest's counts of exact and near duplicates are read from the statistics of another block."""
    assert ": " not in ExactFilter.name and ": " not in compat.NEAR_FILTER_BLOCK
    assert str(ExactFilter(Path("f"), 1, 1)).endswith(f": {ExactFilter.name}")
    assert str(dedup.make_near_filter(Path("f"))).endswith(f": {compat.NEAR_FILTER_BLOCK}")
    assert len({ExactFilter.name, compat.NEAR_FILTER_BLOCK, MinhashDedupCluster.name}) == 3


def test_one_file_of_a_reader_is_read_and_a_missing_one_is_empty(tmp_path):
    """Broken: the steps after the first read no documents, or those of other ranks (RankReader)."""
    with JsonlWriter(str(tmp_path), output_filename="${rank}.jsonl.zst", compression="zstd") as writer:
        for document in make_documents():
            writer.write(document, 3)
    reader = JsonlReader(str(tmp_path), add_file_path=False)
    assert [d.text for d in compat.read_jsonl_file(reader, "00003.jsonl.zst")] == [d.text for d in make_documents()]
    assert list(compat.read_jsonl_file(reader, "00004.jsonl.zst")) == []


def test_repetition_rules_are_those_of_the_filter():
    """Broken: RepetitionFilter compares with other limits than datatrove, or cannot read them."""
    rules = compat.read_repetition_rules(GopherRepetitionFilter(dup_line_frac=0.1, top_n_grams=((2, 0.5),)))
    assert (rules.lines, rules.paragraphs, rules.line_chars, rules.paragraph_chars) == (0.1, 0.3, 0.2, 0.2)
    assert rules.top_n_grams == ((2, 0.5),) and rules.repeated_n_grams[0] == (5, 0.15)
    assert rules.paragraph_separator.split("a\n\n\nb\nc") == ["a", "b\nc"]
    assert rules.line_separator.split("a\n\nb\nc") == ["a", "b", "c"]
    assert compat.find_duplicates(["a", "bb", "bb", "a", "bb"]) == (3, 5)


def test_the_bounded_email_pattern_finds_the_same_addresses():
    """`bound_email_pattern` takes datatrove's pattern apart: addresses would stay in the text."""
    ours, theirs = PIIFormatter(), PIIFormatter()
    compat.bound_email_pattern(ours)
    assert ours.emails_replacer.regex.pattern != theirs.emails_replacer.regex.pattern
    texts = [
        "jane.doe@company.com", "'a-b'@c.de, x+y=z@a-b.co.uk!", "a@b", "a..b@c.d", ".a@b.c", "no @ here", "a@[1.2.3.4]",
        "{x}@y.z.", "a@b.c@d.e", "-a@b-.c", "ü.x@y.z", "q" * 64 + "@a.b", ".".join("abcdefghijk") + "@l.m",
    ]  # fmt: skip
    for text in (*texts, " ".join(texts)):
        assert ours.emails_replacer.regex.findall(text) == theirs.emails_replacer.regex.findall(text), text
    assert ours.format("jane.doe@company.com") == "email@example.com"


def test_whatever_ftfy_changes_may_be_broken():
    """Broken: TextRepair does not give ftfy a line that it would change."""
    theirs = FTFYFormatter(fix_line_breaks=True)
    # The characters of ftfy's tables, surrogates, private use, and all above U+FE00 of the first plane.
    for first, last in ((0, 0x3000), (0xD7F0, 0xE010), (0xF8F0, 0xF910), (0xFE00, 0x10010)):
        for char in map(chr, range(first, last)):
            for text in (f"{char} b", f"a {char}b", f"a{char}, b"):
                assert compat.may_be_broken(text) or theirs.format(text) == text, ascii(text)


def test_parameters_of_a_filter_are_its_attributes():
    """Broken: data_manifest.json no longer states the limits of the filters."""
    parameters = compat.read_filter_parameters(GopherQualityFilter(min_doc_words=7, language=EnglishWords()))
    assert parameters["min_doc_words"] == 7 and "max_non_alpha_words_ratio" in parameters
    assert "language" not in parameters and not any(name.startswith("_") for name in parameters)


class WordModel:
    """Stands for a fastText model: German where the text has a German word. test_filters.py has a real one."""

    def predict(self, text: str, k: int) -> tuple[list[str], np.ndarray]:
        assert "\n" not in text and k == 1
        return [f"__label__{'de' if 'Fluss' in text else 'en'}"], np.array([0.9])


def test_the_classifier_of_a_language_filter_is_replaced(tmp_path, monkeypatch):
    """Broken: the language filter downloads datatrove's model of 126 MB instead of reading the packaged one."""
    import fasttext

    paths = []
    monkeypatch.setattr(fasttext, "load_model", lambda path: paths.append(path) or WordModel())
    block = LanguageFilter(["en"], language_threshold=0.5)
    compat.set_language_classifier(block, compat.LocalLanguageClassifier(tmp_path / "model.bin", ["en"]))
    block = pickle.loads(pickle.dumps(block))
    assert not paths  # loaded on first use, after the block was sent to a worker
    english, german = (Document(text=text, id="") for text in ("the river\nthe river", "der Fluss"))
    assert block.filter(english) and not block.filter(german)
    assert german.metadata["language"] == "de" and paths == [str(tmp_path / "model.bin")]


def test_signatures_are_written_to_the_folder_that_was_set(tmp_path):
    """Broken: all groups of near duplicates share one folder of signatures (GroupSignature)."""
    block = dedup.make_near_signature(tmp_path, ["b", "a"])
    text = "the river carries copper down to the harbour of the old village"
    block.run([Document(text=text, id="0")], rank=1, world_size=2)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.sig")} == {"a"}


def test_an_inner_block_counts_into_the_outer_one():
    """Broken: the statistics of the blocks that run once a group are lost (EveryGroup)."""

    outer, inner = dedup.EveryGroup("outer", dedup.make_near_filter, []), LambdaFilter(judge)
    compat.share_statistics(inner, outer)
    list(inner.run(make_documents()))
    assert outer.stats[compat.FILTER_INPUT].total == 4


def test_a_tokenizer_object_is_taken_as_a_language(monkeypatch):
    """Broken: datatrove's blocks split words with spaCy's whole pipeline again, several times slower."""
    words = EnglishWords()
    assert load_word_tokenizer(words) == words  # an equal one: datatrove caches them
    assert SpaCyTokenizer in type(words).mro()
    seen = []
    monkeypatch.setattr(EnglishWords, "word_tokenize", lambda self, text: seen.append(text) or text.split())
    datatrove_text.split_into_parts.cache_clear()
    for block in (C4QualityFilter(language=words), GopherQualityFilter(language=words)):
        block.filter(Document(text="The river carries copper. It is old.", id=""))
    assert seen == ["The river carries copper. It is old."]  # once for both: datatrove caches by text and tokenizer
    datatrove_text.split_into_parts.cache_clear()


def test_spacy_splits_lines_apart_and_names_sentence_ends():
    """Broken: EnglishWords gives words of another piece of the text, or other sentences than spaCy."""
    lines = ["don't", "(U.S.A.)", ":-)", "\u3002"]
    together = compat.tokenize_lines(EnglishWords(), lines)
    assert together == [compat.tokenize_lines(EnglishWords(), [line])[0] for line in lines]
    assert together[0] == ["do", "n't"]
    assert compat.tokenize_lines(EnglishWords(), []) == []
    assert {".", "!", "?", "\u3002"} <= compat.SENTENCE_ENDS and "," not in compat.SENTENCE_ENDS
    assert compat.is_punct(")") and not compat.is_punct("a")


@pytest.mark.parametrize("text", ["", "a page", "größe \U0001f600"])
def test_datatroves_hash_of_a_text_is_that_of_its_utf_8(text):
    """MinHash compares these hashes. xxhash 4 refuses a str."""
    assert create_hash_func(HashConfig(), str)(text) == xxhash.xxh64_intdigest(text.encode())


def test_a_block_of_datatrove_keeps_the_folder_that_it_is_given(tmp_path):
    """LocalFolder: a block that made a DataFolder of its own would read the path as a pattern and an address."""
    folder = compat.LocalFolder(tmp_path / "x [v1]")
    assert get_datafolder(folder) is folder
    assert MinhashDedupCluster(folder, folder, near_pairs.MINHASH).input_folder is folder
    assert JsonlWriter(folder, output_filename="${rank}.jsonl").output_folder is folder
    assert compat.JsonlReader(folder).data_folder is folder
    assert LocalPipelineExecutor([], logging_dir=folder).logging_dir is folder
