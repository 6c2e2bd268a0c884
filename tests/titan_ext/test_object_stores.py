"""The loader over object stores: it yields the batches of the folder, and finds damage before it yields a batch."""

import numpy as np
import pytest

from core.errors import DamagedData, RefusedInput
from tests.titan_ext.object_stores import STORES, read_files
from tests.titan_ext.stage_of_shards import G, build, sequences

MATH = {"math": 1.0}
SHARD = "math/shard.00001.mds.zstd"


@pytest.fixture(params=STORES)
def store(request, stage, monkeypatch):
    with STORES[request.param](stage, monkeypatch) as found:
        yield found


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_an_object_store_gives_what_its_folder_gives(store, stage, cache, tmp_path):
    expected = sequences([build(stage, cache, mixture=MATH)], 4 * G)
    np.testing.assert_array_equal(sequences([build(store.address, tmp_path, mixture=MATH)], 4 * G), expected)
    # The second start finds that the cache was damaged meanwhile, and downloads again.
    for shard in tmp_path.glob("*/*.mds"):
        shard.write_bytes(flip(shard.read_bytes()))
    np.testing.assert_array_equal(sequences([build(store.address, tmp_path, mixture=MATH)], 4 * G), expected)


@pytest.mark.parametrize("damage", [flip, lambda content: content[:-7], None])
def test_a_damaged_object_is_refused_by_name_also_on_the_second_start(store, stage, tmp_path, damage):
    if damage:
        store.put(SHARD, damage(read_files(stage)[SHARD]))
    else:
        store.delete(SHARD)
    for _ in range(2):
        with pytest.raises(DamagedData, match=f"{store.address}/{SHARD} is damaged, missing or out of reach"):
            sequences([build(store.address, tmp_path, mixture=MATH)], 20 * G)
    store.put(SHARD, read_files(stage)[SHARD])
    sequences([build(store.address, tmp_path, mixture=MATH)], 20 * G)


def test_a_missing_index_is_refused_by_name(store, tmp_path):
    store.delete("math/index.json")
    with pytest.raises(RefusedInput, match=f"{store.address}/math/index.json is missing or out of reach"):
        build(store.address, tmp_path, mixture=MATH)
