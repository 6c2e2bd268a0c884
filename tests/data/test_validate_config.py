"""A config that cannot work is refused before anything starts; an input of which nothing is left fails the step."""

import dataclasses
import json
import math

import pytest

from core.errors import DamagedData, RefusedInput
from core.stages import STAGES
from data.catalogue import corpora
from data.catalogue.corpora import SMOKE_CORPORA
from data.catalogue.corpus import TEXT_DOMAINS, RemoteFiles
from data.config import DataConfig, TokenizerConfig
from data.filters.decontaminate import build_index, hash_item
from data.filters.split import assign_split
from data.pipeline import prepare
from data.readers import remote_readers
from data.report.data_manifest import check_not_empty
from data.validate_config import estimate_bytes, validate_config

GOOD = DataConfig(corpora=SMOKE_CORPORA)


def test_smoke_config_passes_and_its_estimate_is_tens_of_megabytes():
    validate_config(GOOD)
    assert 20e6 < estimate_bytes(GOOD) < 200e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpora": ()}, r"data\.corpora = \(\): no corpus chosen"),
        ({"corpora": ("c4-sampel",)}, r"data\.corpora = 'c4-sampel': not in the catalogue; choose from: .*c4-sample"),
        ({"corpora": ("c4-sample", "c4-sample")}, r"named twice"),
        ({"corpora": ("dialogues",)}, r"no text corpus"),
        ({"heldout_fraction": 0.0}, r"data\.heldout_fraction = 0\.0: must be above 0"),
        ({"heldout_fraction": 0.6}, r"data\.heldout_fraction = 0\.6"),
        (
            {"midtrain_fraction": dict.fromkeys(TEXT_DOMAINS, 0.2) | {"web": 1.0}},
            r"data\.midtrain_fraction\.web = 1\.0: .*below 1",
        ),
        ({"midtrain_fraction": {"web": 0.1, "text": 0.1}}, r"data\.midtrain_fraction = .*add or remove code, .*text"),
        ({"max_heldout_tokens": 0}, r"data\.max_heldout_tokens = 0: must be at least 1"),
        ({"max_epochs": dict.fromkeys(STAGES, 4.0) | {"sft": math.nan}}, r"data\.max_epochs\.sft = nan: .*above 0"),
        ({"decontaminate_ngram": 2}, r"data\.decontaminate_ngram = 2: must be at least 5"),
        ({"shard_bytes": 100}, r"data\.shard_bytes = 100"),
        ({"shard_bytes": 1 << 32}, r"data\.shard_bytes"),
        ({"near_duplicates_within": "dump"}, r"data\.near_duplicates_within = 'dump': .*all, corpus"),
        ({"workers": 0}, r"data\.workers = 0"),
        ({"tokenizer": TokenizerConfig(train_vocab_size=100)}, r"data\.tokenizer\.train_vocab_size = 100: .*264"),
        ({"tokenizer": TokenizerConfig(path="/nowhere")}, r"data\.tokenizer\.path = '/nowhere': .* does not exist"),
    ],
)
def test_refusals_name_field_value_and_way_out(change, message):
    with pytest.raises(RefusedInput, match=message):
        validate_config(dataclasses.replace(GOOD, **change))


def test_prepare_refuses_before_it_writes(tmp_path):
    with pytest.raises(RefusedInput, match="heldout_fraction"):
        prepare(
            dataclasses.replace(GOOD, heldout_fraction=2.0), packages={}, benchmark_texts=None, out=tmp_path / "out",
            progress=lambda *_: None,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_corpus_of_which_nothing_is_left_fails_the_step_with_the_counts(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"too short {i}"}) + "\n" for i in range(5)))
    short = corpora.Corpus(
        "short",
        "web",
        "text",
        "prose",
        "test",
        RemoteFiles(str(tmp_path), "*.jsonl"),
        remote_readers.read_text,
        text_bytes=1,
    )
    monkeypatch.setitem(corpora.CATALOGUE, "short", short)
    with pytest.raises(RuntimeError, match=r"nothing is left of 'short': 5 rows read, .*'gopher_\w+'.*: 5"):
        prepare(
            DataConfig(corpora=("short",)), packages={}, benchmark_texts=None, out=tmp_path / "out",
            progress=lambda *_: None,
        )  # fmt: skip


def test_benchmark_line_of_another_form_is_named(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"benchmark": "b", "text": "fine"}\n{"benchmark": "b"}\n')
    with pytest.raises(DamagedData, match="line 2 of"):
        build_index(path, 13, tmp_path / "index")


def test_runs_ignore_case_punctuation_and_accents_but_not_numbers():
    one = hash_item("The café, at Nº 5: opens AT nine!", 5)
    assert (one == hash_item("the cafe at nº 5 opens at nine", 5)).all()
    assert len(one) == 4
    assert not set(one) & set(hash_item("the cafe at nº 6 opens at ten", 5)[1:])


def test_split_is_a_function_of_the_text_with_the_asked_shares():
    parts = [assign_split(f"text {i}", ("pretrain", "midtrain"), 0, 0.1, 0.25) for i in range(20_000)]
    assert parts == [assign_split(f"text {i}", ("pretrain", "midtrain"), 0, 0.1, 0.25) for i in range(20_000)]
    assert parts.count("heldout") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert parts.count("midtrain") / 20_000 == pytest.approx(0.9 * 0.25, abs=0.01)
    assert assign_split("text 1", ("sft",), 0, 0.0, 0.9) == "sft"
    assert assign_split("text 1", ("midtrain",), 0, 0.0, 0.0) == "midtrain"


def test_a_corpus_with_documents_passes():
    check_not_empty({"fine": {"kept": 1}})
