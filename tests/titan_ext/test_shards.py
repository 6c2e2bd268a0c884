"""Damaged shards, a cache that several processes share or a killed one left, and checkpoints of several ranks."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch.distributed.checkpoint.api import CheckpointException

from core.errors import DamagedData, RefusedInput
from tests.titan_ext.stage_of_shards import (
    DOCUMENTS,
    G,
    build,
    sequences,
    write_stage,
)

# --- damaged shards -------------------------------------------------------------------------------------------------


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_damaged_source_is_refused_by_name(tmp_path, damage, compression):
    write_stage(tmp_path / "s", compression=compression)
    (shard,) = (tmp_path / "s/math").glob("shard.00001.mds*")
    damage(shard)
    with pytest.raises(DamagedData, match=f"math/{shard.name} is damaged"):
        sequences([build(tmp_path / "s", tmp_path / "cache")], 20 * G)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_damaged_shard_in_the_cache_is_fetched_again(stage, tmp_path, damage):
    expected = sequences([build(stage, tmp_path)], 10 * G)
    shards = sorted(tmp_path.glob("*/*.mds"))
    for shard in shards:
        damage(shard)
    np.testing.assert_array_equal(sequences([build(stage, tmp_path)], 10 * G), expected)
    assert_cache_is_intact(tmp_path, stage)


def assert_cache_is_intact(cache, stage):
    assert list(cache.glob("*/*.mds"))
    for name in DOCUMENTS:
        hashes = {
            shard["raw_data"]["basename"]: shard["raw_data"]["hashes"]["xxh64"]
            for shard in json.loads((stage / name / "index.json").read_text())["shards"]
        }
        for path in cache.glob(f"{name}-*/*.mds"):
            assert xxhash.xxh64(path.read_bytes()).hexdigest() == hashes[path.name]


def test_the_source_is_never_written_to(tmp_path):
    write_stage(tmp_path / "s")
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*.*")}
    sequences([build(tmp_path / "s", tmp_path / "cache")], 10 * G)
    assert {path: path.read_bytes() for path in (tmp_path / "s").rglob("*.*")} == before


def test_the_cache_stays_within_its_limit(stage, cache, tmp_path):
    expected = sequences([build(stage, cache)], 10 * G)
    limited = sequences([build(stage, tmp_path, cache_bytes=10_000)], 10 * G)
    np.testing.assert_array_equal(limited, expected)
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("*/*.mds")) <= 10_000


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Fork workers from a clean process, which has done the imports once and has none of pytest's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titan_ext.loader.streaming_loader"])
    return context


def _run_all(stage, cache, cache_bytes, barrier, results):
    barrier.wait()
    results.put(sequences([build(stage, cache, cache_bytes=cache_bytes)], 20 * G))


@pytest.mark.parametrize("cache_bytes", [1 << 30, 6000])
def test_processes_may_prepare_one_cache_at_once(processes, stage, cache, tmp_path, cache_bytes):
    expected = sequences([build(stage, cache)], 20 * G)
    barrier, results = processes.Barrier(3), processes.Queue()
    workers = [
        processes.Process(target=_run_all, args=(stage, tmp_path, cache_bytes, barrier, results), daemon=True)
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for _ in workers:
        np.testing.assert_array_equal(results.get(timeout=120), expected)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert_cache_is_intact(tmp_path, stage)


def _run_for_ever(stage, cache, started):
    loader = build(stage, cache, cache_bytes=5000)  # a shard is prepared nearly all the time
    for _ in loader:
        started.set()


def test_a_killed_process_leaves_nothing_that_blocks_the_next(processes, stage, cache, tmp_path):
    expected = sequences([build(stage, cache)], 10 * G)
    shared_memory = set(os.listdir("/dev/shm"))
    for pause in (0.0, 0.03, 0.2):
        started = processes.Event()
        worker = processes.Process(target=_run_for_ever, args=(stage, tmp_path, started), daemon=True)
        worker.start()
        assert started.wait(120)
        time.sleep(pause)
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        np.testing.assert_array_equal(sequences([build(stage, tmp_path)], 10 * G), expected)
    assert {name for name in set(os.listdir("/dev/shm")) - shared_memory if "sem." not in name} == set()


def _save(stage, cache, rank, world, folder):
    # Not by a file:// address: torch takes what follows a "#" in the path for a fragment, and opens another file.
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}.init", world), rank=rank, world_size=world)
    loader = build(stage, cache, rank, world)
    sequences([loader], 3 * G // world)
    dcp.save({"dataloader": loader}, checkpoint_id=folder)
    dist.destroy_process_group()


def test_a_dcp_checkpoint_of_two_ranks_resumes_on_one_and_on_four(processes, stage, cache, tmp_path):
    folder = str(tmp_path / "step-3")
    workers = [processes.Process(target=_save, args=(stage, cache, rank, 2, folder), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    expected = sequences([build(stage, cache)], 5 * G)[3 * G :]
    for world in (1, 4):
        loaders = [build(stage, cache, rank, world) for rank in range(world)]
        for loader in loaders:
            dcp.load({"dataloader": loader}, checkpoint_id=folder, no_dist=True)
        np.testing.assert_array_equal(sequences(loaders, 2 * G // world), expected)
    with pytest.raises(RefusedInput, match="seed: 3 in the checkpoint, 5 now"):
        dcp.load({"dataloader": build(stage, cache, seed=5)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointException, match="order_2_section_00_of_16"):
        dcp.load({"dataloader": build(stage, cache, global_batch_size=16)}, checkpoint_id=folder, no_dist=True)
