"""Undocumented behaviour of streaming that titan_ext.loader relies on, one small test each."""

import json

import numpy as np
import pytest
from streaming import Stream

from tests.titan_ext.stage_of_shards import write_domain
from titan_ext.compat import download_file, make_shard_reader


@pytest.fixture
def folder(tmp_path):
    write_domain(tmp_path / "web", [[1, 2, 3], [4, 5]], [[0, 1, 1], [0, 1]])
    return tmp_path / "web"


def open_stream(source, local) -> Stream:
    return Stream(
        remote=str(source), local=str(local), validate_hash="xxh64", keep_zip=False, download_retry=1,
        download_timeout=10,
    )  # fmt: skip


def make_readers(folder):
    entries = json.loads((folder / "index.json").read_text())["shards"]
    return [make_shard_reader(str(folder), entry) for entry in entries]


def test_readers_know_the_files_of_their_shard(folder, tmp_path):
    """When this fails, ShardStore cannot find, lock or verify its shards."""
    local = tmp_path / "local"
    local.mkdir()
    download_file(f"{folder}/index.json", local / "index.json")
    stream = open_stream(folder, local)
    (reader,) = make_readers(local)
    assert (reader.samples, reader.column_names) == (2, ["loss_mask", "tokens"])
    assert (reader.raw_data.basename, reader.zip_data.basename) == ("shard.00000.mds", "shard.00000.mds.zstd")
    assert "xxh64" in reader.raw_data.hashes
    stream.prepare_shard(reader)
    content = (local / reader.raw_data.basename).read_bytes()
    assert len(content) == reader.raw_data.bytes
    assert not (local / reader.zip_data.basename).exists()
    assert int.from_bytes(content[:4], "little") == reader.samples, "an MDS file begins with its number of samples"
    sample = reader.get_item(1)
    np.testing.assert_array_equal(sample["tokens"], np.array([4, 5], np.uint32))
    np.testing.assert_array_equal(sample["loss_mask"], np.array([0, 1], np.uint8))


def test_a_reader_of_a_missing_file_raises_file_not_found(folder, tmp_path):
    """When this fails, ShardStore.read does not fetch a shard again that another process has deleted."""
    (reader,) = make_readers(folder)
    with pytest.raises(FileNotFoundError):
        reader.get_item(0)


def test_a_stream_takes_an_incomplete_file_for_a_complete_one(folder, tmp_path):
    """When this fails, ShardStore._fetch need not delete leftovers before it fetches."""
    local = tmp_path / "local"
    local.mkdir()
    (local / "index.json").write_bytes((folder / "index.json").read_bytes())
    (local / "shard.00000.mds").write_bytes(b"cut")
    stream = open_stream(folder, local)
    (reader,) = make_readers(local)
    stream.prepare_shard(reader)
    assert (local / "shard.00000.mds").read_bytes() == b"cut"
