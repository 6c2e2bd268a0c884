"""A data set that runs share: sent, opened, checked, taken over, and read by the loader from where it lies."""

import dataclasses

import numpy as np
import pytest

from core.errors import DamagedData, RefusedInput
from data.tokens.verify_shards import verify_shards
from pipelines.cli import main
from pipelines.shared_data import check_config, find_uncovered, open_shared_data, receive_data, send_data
from tests.data.conftest import prepared  # noqa: F401  a fixture
from tests.data.planted import CONFIG
from tests.titan_ext.object_stores import s3
from titan_ext.loader.shard_store import ShardStore

WEB = "shards/pretrain/web"


def quietly(*_):
    """Report no progress."""


@pytest.fixture(params=["path", "s3"])
def address(request, prepared, tmp_path, monkeypatch):  # noqa: F811
    """Address that the prepared data set was sent to."""
    if request.param == "path":
        send_data(prepared.out, str(tmp_path / "sent"), quietly)
        yield str(tmp_path / "sent")
        return
    (tmp_path / "empty").mkdir()
    with s3(tmp_path / "empty", monkeypatch):
        send_data(prepared.out, "s3://bucket/sets/web", quietly)
        yield "s3://bucket/sets/web"


def read_tokens(source, cache):
    store = ShardStore("web", str(source), cache, 1 << 30)
    return [
        store.read(shard, index)["tokens"] for shard, size in enumerate(store.index.samples) for index in range(size)
    ]


def test_a_run_reads_the_shards_from_where_they_lie(prepared, address, tmp_path):  # noqa: F811
    shared, folder = open_shared_data(address), tmp_path / "run/data"
    receive_data(shared, folder, quietly)
    receive_data(shared, folder, quietly)  # again, as after an interruption
    assert (folder / "data_manifest.json").read_bytes() == (prepared.out / "data_manifest.json").read_bytes()
    assert not list((folder / WEB).glob("*.zstd")) and list((folder / "heldout").rglob("*.zstd"))
    for name in ("tokenizer/tokenizer.json", f"{WEB}/index.json", "statistics.html"):
        assert (folder / name).read_bytes() == (prepared.out / name).read_bytes()
    for found, expected in zip(
        read_tokens(folder / WEB, tmp_path / "cache"), read_tokens(prepared.out / WEB, tmp_path / "other"), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(RefusedInput, match="holds the index alone; verify the data set"):
        verify_shards(folder)


def test_what_was_sent_is_not_sent_again_and_a_cut_off_shard_is(prepared, tmp_path):  # noqa: F811
    out = tmp_path / "sent"
    send_data(prepared.out, str(out), quietly)
    shards = sorted(out.rglob("*.zstd"))
    before = {shard: shard.stat().st_mtime_ns for shard in shards}
    shards[0].write_bytes(shards[0].read_bytes()[:-3])
    (out / "data_manifest.json").unlink()
    with pytest.raises(RefusedInput, match=r"no data_manifest\.json there.*unfinished"):
        open_shared_data(str(out))
    send_data(prepared.out, str(out), quietly)
    assert {shard for shard in shards if shard.stat().st_mtime_ns != before[shard]} == {shards[0]}
    open_shared_data(str(out))


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", f"{WEB}/index.json", "heldout/pretrain/web/index.json"])
def test_a_changed_file_is_named(prepared, tmp_path, name):  # noqa: F811
    send_data(prepared.out, str(tmp_path / "sent"), quietly)
    (tmp_path / "sent" / name).write_text("{}")
    with pytest.raises(DamagedData, match=f"{name} has SHA-256"):
        receive_data(open_shared_data(str(tmp_path / "sent")), tmp_path / "data", quietly)
    assert not (tmp_path / "data/data_manifest.json").exists()


def test_a_changed_shard_is_found_when_it_is_read(prepared, tmp_path):  # noqa: F811
    out = tmp_path / "sent"
    send_data(prepared.out, str(out), quietly)
    receive_data(open_shared_data(str(out)), tmp_path / "data", quietly)
    shard = sorted((out / WEB).glob("*.zstd"))[0]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DamagedData, match="is damaged, missing or out of reach"):
        read_tokens(tmp_path / "data" / WEB, tmp_path / "cache")


def test_options_that_differ_are_named_and_those_without_effect_are_none(prepared):  # noqa: F811
    shared = open_shared_data(str(prepared.out))
    check_config(shared, dataclasses.replace(CONFIG, workers=9, max_malformed_share=0.5, max_epochs={"sft": 99.0}))
    other = dataclasses.replace(CONFIG, decontaminate_ngram=11, corpora=("planted",))
    with pytest.raises(RefusedInput) as caught:
        check_config(shared, other)
    assert "data.decontaminate_ngram is 13 there, 11 here" in str(caught.value)
    assert "data.corpora is ['planted', 'mirror'" in str(caught.value)
    smaller = dataclasses.replace(CONFIG.tokenizer, train_vocab_size=999)
    with pytest.raises(RefusedInput, match="train_vocab_size is 1024 there, 999 here"):
        check_config(shared, dataclasses.replace(CONFIG, tokenizer=smaller))


def test_benchmarks_that_were_not_searched_for_are_known(prepared):  # noqa: F811
    assert find_uncovered(open_shared_data(str(prepared.out)), ["bakery", "piqa"]) == ["piqa"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"plan": 1}', "\xff"])
def test_a_damaged_or_old_manifest_is_refused(tmp_path, content):
    (tmp_path / "data_manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(RefusedInput, match=r"its data_manifest\.json is (damaged|of an older version)"):
        open_shared_data(str(tmp_path))


def test_the_command_refuses_before_anything_starts(prepared, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (("run", "smoke", "--data", str(prepared.out)), "made with other options than the recipe's"),
        (("run", "smoke", "--data", str(tmp_path / "nowhere")), "no data_manifest.json there"),
        (("data", "smoke"), "--out: give the folder or the address"),
        (("data", "smoke", "--out", "x", "--work", "y"), "--work y: the work is done in the folder --out"),
        (("data", "smoke", "--out", "nosuch://bucket/x"), "nosuch"),
    ):
        assert main(list(words)) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_not_there_is_refused(prepared, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "empty").mkdir()
    with s3(tmp_path / "empty", monkeypatch), pytest.raises(RefusedInput, match="there is no bucket 'other'"):
        send_data(prepared.out, "s3://other/sets", quietly)
