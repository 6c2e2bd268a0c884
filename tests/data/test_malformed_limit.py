"""A corpus with too many malformed rows stops the data step, and the same command goes on once the cause is gone."""

import dataclasses
import json
from pathlib import Path

import pytest

from data.catalogue.corpora import CATALOGUE
from data.catalogue.corpus import RemoteFiles
from data.config import DataConfig, TokenizerConfig
from data.pipeline import prepare
from tests.data.planted import page, planted_corpora

GOOD, BAD = 60, 30


def write_corpus(folder: Path, first: int, bad: int) -> None:
    """Write GOOD usable rows, the pages from `first` on, and others whose text is a list."""
    rows = [{"text": page(first + number)} for number in range(GOOD)] + [{"text": [str(n)]} for n in range(bad)]
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_corpus(patch: pytest.MonkeyPatch, name: str, folder: Path) -> None:
    source = RemoteFiles(str(folder), "*.jsonl")
    corpus = dataclasses.replace(planted_corpora(folder)["mirror"], name=name, source=source, stages=("pretrain",))
    patch.setitem(CATALOGUE, name, corpus)


def run(out: Path, share: float) -> dict:
    config = DataConfig(
        corpora=("whole", "broken"),
        tokenizer=TokenizerConfig(train_vocab_size=512),
        languages=(),
        filters=(),
        heldout_fraction=0.1,
        max_malformed_share=share,
    )
    return prepare(config, packages={}, benchmark_texts=None, out=out, progress=lambda *_: None)


def test_too_many_malformed_rows_stop_the_step_until_files_or_limit_change(tmp_path, monkeypatch):
    write_corpus(tmp_path / "whole", 0, bad=10)  # never too many
    write_corpus(tmp_path / "broken", GOOD, bad=BAD)
    for name in ("whole", "broken"):
        add_corpus(monkeypatch, name, tmp_path / name)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"broken: 30 of 90 rows \(33\.3%\).* = 0\.01 .*\(text is list, not a string"):
        run(out, 0.01)
    samples = (out / "set_aside/malformed/broken.00000.jsonl").read_text().splitlines()
    assert len(samples) == 10 and json.loads(samples[0])["reason"] == "text is list, not a string"
    read = [out / f"work/read/{rank:05d}.json" for rank in (0, 1)]
    before = [path.stat().st_mtime_ns for path in read]

    write_corpus(tmp_path / "broken", GOOD, bad=20)
    with pytest.raises(ValueError, match=r"broken: 20 of 80 rows"):
        run(out, 0.01)
    after = [path.stat().st_mtime_ns for path in read]
    assert after[0] == before[0], "the other corpus is not read again"
    assert after[1] > before[1], "the corpus that stopped the step is read again: its files may have been corrected"

    # More than the limit allowed, and now allowed: what was read stays.
    entry = run(out, 0.3)["corpora"]
    assert entry["broken"]["malformed_reasons"] == {"text is list, not a string": 20}
    assert entry["broken"]["malformed"] == 20 and entry["broken"]["read"] == 80
    assert entry["whole"]["malformed"] == 10
    assert "max_malformed_share" not in json.loads((out / "data_manifest.json").read_text())["plan"]["config"]
    page_text = (out / "statistics.html").read_text()
    assert "malformed rows" in page_text and "text is list, not a string 20" in page_text
