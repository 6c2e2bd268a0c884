"""A document that a block works on for too long is set aside; the others are kept, and the counts are right."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from data import compat
from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import Unit
from data.execution import StepRunner
from data.filters import dedup, time_limit
from data.filters.decontaminate import DecontaminationFilter
from data.filters.exact_dedup import ExactFilter
from data.filters.quality import PIIRedaction, StyleFilter
from data.filters.time_limit import MARK, SlowDocuments, TooSlow, limit_time, run_limited
from data.report import data_manifest
from data.report.statistics_page import make_corpus_rows

BACKTRACKING = re.compile(r"(a|aa)+b")
LIMIT = 0.2


@pytest.fixture(autouse=True)
def tiny_limit(monkeypatch):
    monkeypatch.setattr(time_limit, "MAX_SECONDS", LIMIT)


def documents(*texts: str) -> list[Document]:
    return [Document(text=text, id=str(i), metadata={"style": "prose"}) for i, text in enumerate(texts)]


class Backtracking(BaseFilter):
    """Keeps every document, after a search that takes exponential time where a text is many a's."""

    name = "backtracking"

    def filter(self, doc: Document) -> bool:
        BACKTRACKING.search(doc.text)
        return True


class Recorder(BaseFilter):
    name = "recorder"

    def __init__(self):
        super().__init__()
        self.seen = []

    def filter(self, doc: Document) -> bool:
        self.seen.append(doc.text)
        return True


LABELS = [f"c.{rank:05d}" for rank in range(4)]


def test_a_slow_document_is_set_aside_and_the_others_are_kept(tmp_path):
    slow, recorder, last = (
        StyleFilter(Backtracking(), ("prose",), "slow one"),
        Recorder(),
        SlowDocuments(tmp_path, LABELS),
    )
    after = StyleFilter(recorder, ("prose",), "after")
    data = documents("first", "a" * 200, "second", "a" * 300, "third")
    for block in (slow, after, last):
        data = block.run(data, rank=3)
    assert [document.text for document in data] == ["first", "second", "third"]
    assert recorder.seen == ["first", "second", "third"]  # no later block works on a slow document
    assert (last.stats["total"].total, last.stats["forwarded"].total, last.stats["dropped_slow one"].total) == (5, 3, 2)
    samples = [json.loads(line) for line in (tmp_path / "c.00003.jsonl").read_text().splitlines()]
    assert [(row["reason"], row["id"], len(row["sample"])) for row in samples] == [
        ("too slow: slow one", "1", 200), ("too slow: slow one", "3", 300),
    ]  # fmt: skip


def test_nothing_is_left_behind_where_no_document_is_slow(tmp_path):
    assert len(list(SlowDocuments(tmp_path, LABELS).run(documents("first", "second")))) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_slow_repair_leaves_the_text_and_marks_the_document(monkeypatch):
    block = PIIRedaction()
    monkeypatch.setattr(block, "format", lambda text: BACKTRACKING.sub("", text))
    slow, quick = block.run(documents("a" * 200, "aab!"))
    assert (slow.text, slow.metadata[MARK]) == ("a" * 200, "pii")
    assert quick.text == "!" and MARK not in quick.metadata
    assert block.stats["redacted"].total == 1


def test_a_slow_decontamination_counts_no_hit(tmp_path, monkeypatch):
    block = DecontaminationFilter(tmp_path, 13, None)
    monkeypatch.setattr(block, "_find_benchmarks", lambda text: BACKTRACKING.search(text) or {})
    (document,) = documents("a" * 200)
    assert block.filter(document) is True and document.metadata[MARK] == "decontamination"


def test_a_document_too_slow_to_compare_is_kept_without_signature(tmp_path, monkeypatch):
    block = dedup.make_near_signature(tmp_path, ["all"])
    split = block.word_tokenizer.word_tokenize
    split("spaCy is loaded on first use")

    def split_slowly(text: str) -> list[str]:
        BACKTRACKING.search(text)
        return split(text)

    monkeypatch.setattr(block.word_tokenizer, "word_tokenize", split_slowly)
    words = "one two three four five six seven"
    block.run(documents(words, "a" * 200, words), 0, 1)
    assert block.stats["not_compared"].total == 1
    signatures = np.fromfile(tmp_path / "all/signatures/bucket_000/00000.minhash.sig", np.uint32)
    # 8 hashes of 64 bits and the document's position, 32 bits, each: the first and the third document have a signature.
    assert signatures.reshape(2, 17)[:, -1].tolist() == [0, 2]


def test_the_manifest_counts_slow_documents_of_all_steps(tmp_path):
    text, chat = (next(c for c in CATALOGUE.values() if c.kind == kind) for kind in ("text", "sft"))
    units = [Unit(text, "", 0, 0), Unit(chat, "", 0, 0)]
    steps = {
        "1-read-and-filter": {"time limit": {"total": 9, "dropped": 3, "dropped_pii": 1, "dropped_repair": 2}},
        "3-exact-filter": {ExactFilter.name: {}},
        "4-near-signatures": {"signatures": {"total": 6, "not_compared": 2}},
        "7-decontaminate-and-split": {
            compat.NEAR_FILTER_BLOCK: {}, "by hash": {"pretrain": 5},
            "time limit": {"total": 6, "dropped": 1, "dropped_decontamination": 1},
        },
    }  # fmt: skip
    for step, blocks in steps.items():
        for rank in range(1 if step.startswith("4") else 2):
            path = tmp_path / step / f"stats/{rank:05d}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            counters = [
                {"name": f"block: {name}", "stats": stats if rank == 0 else {}} for name, stats in blocks.items()
            ]
            path.write_text(json.dumps(counters))
    for rank in range(2):
        (tmp_path / f"{rank:05d}.json").write_text(
            '{"read": 9, "malformed": {}, "excluded": {}, "sha256": "", "inputs": []}'
        )
    counts = data_manifest.count_documents(tmp_path, tmp_path, units, [])
    assert counts[text.name]["too_slow"] == {"decontamination": 1, "pii": 1, "repair": 2}
    assert (counts[text.name]["not_compared"], counts[text.name]["kept"]) == (2, 5)
    assert (counts[chat.name]["too_slow"], counts[chat.name]["not_compared"]) == ({}, 0)
    entry = counts[text.name] | {"too_long": 0, "refused": {}, "filters": {}}
    (row,) = make_corpus_rows({"corpora": {"one": entry}})
    assert next(part["count"] for part in row["parts"] if part["outcome"] == "too slow") == 4
    assert sum(part["count"] for part in row["parts"]) == 9


class LimitedSearches(PipelineStep):
    """Writes whether the limit ended a search of exponential time, from the process that an executor chose."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        time_limit.MAX_SECONDS = LIMIT
        (document,) = documents("a" * 200)
        result = run_limited(document, "search", lambda: BACKTRACKING.search(document.text), "too slow")
        (self.folder / str(rank)).write_text(str(result))


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_the_limit_holds_in_the_processes_of_the_executors(kind, tmp_path):
    import ray

    if kind == "ray":
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        StepRunner(kind, 2, tmp_path / "logs", lambda *_: None).run(
            "limit", [LimitedSearches(tmp_path)], ["first", "second"]
        )
    finally:
        ray.shutdown()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["too slow"] * 2


def test_the_limit_counts_processor_time_and_not_waiting():
    (document,) = documents("text")
    assert run_limited(document, "waiting", lambda: time.sleep(2 * LIMIT) or "done", "too slow") == "done"
    assert MARK not in document.metadata


def test_a_library_that_swallows_exceptions_does_not_swallow_the_limit():
    def swallow() -> None:
        while True:
            try:
                BACKTRACKING.search("a" * 200)
            except Exception:
                continue

    (document,) = documents("text")
    assert run_limited(document, "swallowing", swallow, "too slow") == "too slow"


def test_timer_and_handler_are_gone_after_the_block():
    before = signal.getsignal(signal.SIGPROF)
    with limit_time():
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 0
    with pytest.raises(TooSlow), limit_time():
        BACKTRACKING.search("a" * 200)
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) == before
