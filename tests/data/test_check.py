"""A config that cannot work is refused before anything starts; an input that leaves nothing, when it shows."""

import dataclasses
import json

import pytest

from data.catalogue import corpora
from data.catalogue.corpora import SMOKE_CORPORA
from data.config import DataConfig, TokenizerConfig
from data.filters.decontaminate import build_index, item_hashes
from data.pipeline import prepare
from data.readers import remote_readers
from data.readers.blocks import split_of
from data.report.data_manifest import refuse_empty
from data.validate_config import check, estimate_bytes

GOOD = DataConfig(corpora=SMOKE_CORPORA)


def test_smoke_config_passes_and_its_estimate_is_tens_of_megabytes():
    check(GOOD)
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
        ({"midtrain_fraction": 1.0}, r"data\.midtrain_fraction = 1\.0: .*below 1"),
        ({"decontaminate_ngram": 2}, r"data\.decontaminate_ngram = 2: must be at least 5"),
        ({"shard_bytes": 100}, r"data\.shard_bytes = 100"),
        ({"shard_bytes": 1 << 32}, r"data\.shard_bytes"),
        ({"near_duplicates_within": "dump"}, r"data\.near_duplicates_within = 'dump': .*all, corpus, shard"),
        ({"workers": 0}, r"data\.workers = 0"),
        ({"tokenizer": TokenizerConfig(train_vocab_size=100)}, r"data\.tokenizer\.train_vocab_size = 100: .*264"),
        ({"tokenizer": TokenizerConfig(path="/nowhere")}, r"data\.tokenizer\.path = '/nowhere': .* does not exist"),
    ],
)
def test_refusals_name_field_value_and_way_out(change, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(GOOD, **change))


def test_prepare_refuses_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match="heldout_fraction"):
        prepare(
            dataclasses.replace(GOOD, heldout_fraction=2.0), packages={}, benchmark_texts=None, out=tmp_path / "out",
            report=lambda *_: None,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_corpus_of_which_nothing_is_left_is_refused_with_the_counts(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"too short {i}"}) + "\n" for i in range(5)))
    short = corpora.Corpus(
        "short",
        "web",
        "text",
        "prose",
        "test",
        corpora.RemoteFiles(str(tmp_path), "*.jsonl"),
        remote_readers.read_text,
        text_bytes=1,
    )
    monkeypatch.setitem(corpora.CATALOGUE, "short", short)
    with pytest.raises(ValueError, match=r"nothing is left of 'short': 5 rows read, .*'gopher_\w+'.*: 5"):
        prepare(
            DataConfig(corpora=("short",)), packages={}, benchmark_texts=None, out=tmp_path / "out",
            report=lambda *_: None,
        )  # fmt: skip


def test_benchmark_line_of_another_form_is_refused(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text('{"benchmark": "b", "text": "fine"}\n{"benchmark": "b"}\n')
    with pytest.raises(ValueError, match="line 2 of"):
        build_index(path, 13, tmp_path / "index")


def test_runs_ignore_case_punctuation_and_accents_but_not_numbers():
    one = item_hashes("The café, at Nº 5: opens AT nine!", 5)
    assert (one == item_hashes("the cafe at nº 5 opens at nine", 5)).all()
    assert len(one) == 4
    assert not set(one) & set(item_hashes("the cafe at nº 6 opens at ten", 5)[1:])


def test_split_is_a_function_of_the_text_with_the_asked_shares():
    parts = [split_of(f"text {i}", ("pretrain", "midtrain"), 0, 0.1, 0.25) for i in range(20_000)]
    assert parts == [split_of(f"text {i}", ("pretrain", "midtrain"), 0, 0.1, 0.25) for i in range(20_000)]
    assert parts.count("heldout") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert parts.count("midtrain") / 20_000 == pytest.approx(0.9 * 0.25, abs=0.01)
    assert split_of("text 1", ("sft",), 0, 0.0, 0.9) == "sft"
    assert split_of("text 1", ("midtrain",), 0, 0.0, 0.0) == "midtrain"


def test_refuse_empty_lets_a_corpus_with_documents_pass():
    refuse_empty({"fine": {"kept": 1}})
