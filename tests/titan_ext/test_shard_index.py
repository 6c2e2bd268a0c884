"""The mapped index against index.json itself, and its own file when it is stale, cut off or damaged."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import shard_columns
from core.errors import RefusedInput
from core.inside import find_problem
from core.samples import SHARD_HASH, VOCABULARY_KEY
from core.shard_columns import COLUMNS_FILE, write_columns
from tests.titan_ext.stage_of_shards import write_domain
from titan_ext.loader import shard_index
from titan_ext.loader.shard_index import open_index

NAMES = st.text(min_size=1, max_size=20).filter(lambda name: "/" not in name and find_problem(name) is None)


@pytest.fixture
def source(tmp_path):
    """Four compressed shards and two uncompressed ones, as streaming's merge_index joins folders."""
    write_domain(tmp_path / "web", [range(100)] * 14)
    write_domain(tmp_path / "other", [range(100)] * 7, compression=None)
    index = json.loads((tmp_path / "web/index.json").read_text())
    others = json.loads((tmp_path / "other/index.json").read_text())["shards"]
    for number, shard in enumerate(others):
        shutil.copy(tmp_path / "other" / shard["raw_data"]["basename"], tmp_path / f"web/other.{number}.mds")
        shard["raw_data"]["basename"] = f"other.{number}.mds"
    index |= {"shards": index["shards"] + others, VOCABULARY_KEY: "abc"}
    (tmp_path / "web/index.json").write_text(json.dumps(index, indent=2))
    return tmp_path / "web"


def read_entries(source):
    entries = json.loads((source / "index.json").read_text())["shards"]
    for file in (entry[part] for entry in entries for part in ("raw_data", "zip_data") if entry[part]):
        file["hashes"] = {SHARD_HASH: file["hashes"][SHARD_HASH]}
    return entries


def list_entries(index):
    return [index.read_entry(shard) for shard in range(index.num_shards)]


def test_the_mapped_entries_are_those_of_index_json(source, tmp_path):
    for _ in range(2):  # made, and mapped again
        index = open_index(str(source), tmp_path / "cache", "web")
        entries = read_entries(source)
        assert list_entries(index) == entries
        assert index.samples.tolist() == [entry["samples"] for entry in entries]
        assert index.raw_bytes.tolist() == [entry["raw_data"]["bytes"] for entry in entries]
        assert [index.raw_name(i) for i in range(len(entries))] == [e["raw_data"]["basename"] for e in entries]
        assert (index.vocabulary, index.column_names, index.is_compressed) == ("abc", ["tokens"], True)


def test_a_folder_without_shards_has_an_empty_index(tmp_path):
    write_domain(tmp_path / "web", [])
    index = open_index(str(tmp_path / "web"), tmp_path / "cache", "web")
    assert (index.num_shards, index.samples.tolist(), index.column_names) == (0, [], [])


def test_an_index_in_the_cache_that_is_damaged_or_cut_off_is_made_again(source, tmp_path):
    expected = list_entries(open_index(str(source), tmp_path / "cache", "web"))
    (file,) = (tmp_path / "cache").glob(f"web-*/{COLUMNS_FILE}")
    content = file.read_bytes()
    for damaged in (content[:-1] + bytes([content[-1] ^ 1]), content[:-64], content[:40], b""):
        file.write_bytes(damaged)
        assert list_entries(open_index(str(source), tmp_path / "cache", "web")) == expected
        assert file.read_bytes() == content


def test_columns_beside_index_json_are_used_and_those_of_another_index_are_not(source, tmp_path):
    expected = list_entries(open_index(str(source), tmp_path / "cache", "web"))
    write_columns(source / "index.json", source / COLUMNS_FILE)
    index = open_index(str(source), tmp_path / "empty", "web")
    assert list_entries(index) == expected and index.vocabulary == "abc"
    assert not list((tmp_path / "empty").glob(f"*/{COLUMNS_FILE}")), "nothing had to be made"
    content = (source / "index.json").read_text()
    (source / "index.json").write_text(content.replace('"abc"', '"abd"'))
    assert open_index(str(source), tmp_path / "empty", "web").vocabulary == "abd"
    assert list((tmp_path / "empty").glob(f"*/{COLUMNS_FILE}"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(1, 2**40), st.binary(min_size=8, max_size=8), NAMES)))
def test_any_entries_are_mapped_as_they_are(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("any")
    shards = [
        {
            "column_encodings": ["ndarray:uint32"], "column_names": ["tokens"], "samples": samples, "zip_data": None,
            "raw_data": {"basename": name, "bytes": size, "hashes": {SHARD_HASH: digest.hex()}},
        }
        for samples, size, digest, name in entries
    ]  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    write_columns(folder / "index.json", folder / COLUMNS_FILE)
    index = open_index(str(folder), folder / "cache", "web")
    assert list_entries(index) == shards and index.samples.tolist() == [shard["samples"] for shard in shards]


def test_an_unchanged_index_json_is_read_once_a_node_and_a_changed_one_again(source, tmp_path, monkeypatch):
    hashed = []
    sha256_file = shard_index.sha256_file
    monkeypatch.setattr(shard_index, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    first = open_index(str(source), tmp_path / "cache", "web")
    open_index(str(source), tmp_path / "cache", "web")
    assert len(hashed) == 2, "a file that was written a moment ago may change without a change of its times"
    monkeypatch.setattr(shard_index, "SETTLED_NANOSECONDS", 0)
    for _ in range(3):
        assert open_index(str(source), tmp_path / "cache", "web").fingerprint == first.fingerprint
    assert len(hashed) == 3
    content = (source / "index.json").read_text()
    (source / "index.json").write_text(content.replace('"abc"', '"abd"'))
    changed = open_index(str(source), tmp_path / "cache", "web")
    assert changed.vocabulary == "abd" and changed.fingerprint != first.fingerprint


def test_a_damaged_record_of_hashes_is_replaced(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_index, "SETTLED_NANOSECONDS", 0)
    first = open_index(str(source), tmp_path / "cache", "web")
    (record,) = (tmp_path / "cache/index-hashes").iterdir()
    written = record.read_text()
    for damaged in ("", "[]", '{"identity": null}'):
        record.write_text(damaged)
        assert open_index(str(source), tmp_path / "cache", "web").fingerprint == first.fingerprint
        assert record.read_text() == written


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.pop("shards"),
        lambda index: index.update(version=1),
        lambda index: index["shards"].append({}),
        lambda index: index["shards"][1].pop("samples"),
        lambda index: index["shards"][1]["raw_data"]["hashes"].update({SHARD_HASH: "no hash"}),
    ],
)
def test_a_damaged_index_json_is_refused_by_name_and_leaves_nothing(source, tmp_path, damage):
    index = json.loads((source / "index.json").read_text())
    damage(index)
    (source / "index.json").write_text(json.dumps(index))
    for _ in range(2):
        with pytest.raises(RefusedInput, match=r"web/index\.json is damaged"):
            open_index(str(source), tmp_path / "cache", "web")
    assert list((tmp_path / "cache").glob(f"*/{COLUMNS_FILE}")) == []


@pytest.mark.parametrize(
    "name", ["../victim.00000.mds", "/tmp/victim.mds", "sub/a.00000.mds", "a\\b.mds", "CON", "a\0b"]
)
@pytest.mark.parametrize("part", ["raw_data", "zip_data"])
def test_a_shard_that_would_be_unpacked_elsewhere_is_refused(source, tmp_path, name, part):
    """By the index, and by columns that somebody else wrote beside it."""
    honest = (source / "index.json").read_text()
    index = json.loads(honest)
    for shard in index["shards"]:
        if shard[part]:
            shard[part]["basename"] = name
    (source / "index.json").write_text(json.dumps(index))
    with pytest.raises(RefusedInput, match=r"index\.json: .*(rename it|write the shards again)"):
        open_index(str(source), tmp_path / "cache", "web")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_columns, "check_shard_name", lambda name, source: None)
        write_columns(source / "index.json", source / COLUMNS_FILE)
    planted = open_index(str(source), tmp_path / "cache", "web")
    if "\0" in name:
        return  # the columns fill names up with zeros
    with pytest.raises(RefusedInput, match=r"(rename it|write the shards again)"):
        list_entries(planted)
