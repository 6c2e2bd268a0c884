"""What a stage refuses before its first step: a cache that is too small or not there, another order."""

import json
import re

import pytest
import torch.distributed.checkpoint as dcp

from core.errors import RefusedInput
from tests.titan_ext.stage_data import write_data
from tests.titan_ext.stage_of_shards import G, build, sequences
from titan_ext.config import FLAVORS, ParallelConfig, ShardCacheConfig
from titan_ext.loader.order import HELD_SHARDS
from titan_ext.training.checkpoint_files import check_loader_order
from titan_ext.training.schedules import tiny_stages
from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import build_stage_config, check_shard_cache


def make_spec(tmp_path, size_bytes, **parallel):
    cache = ShardCacheConfig(str(tmp_path / "cache"), size_bytes)
    stage, layout = tiny_stages()["pretrain"], ParallelConfig(**parallel)
    return StageSpec("pretrain", FLAVORS["tiny"], stage, layout, tmp_path / "d", tmp_path, None, 0, shard_cache=cache)


def test_a_cache_below_what_the_node_holds_is_refused_with_the_bytes(stage, cache, tmp_path, monkeypatch):
    loader = build(stage, cache, rank=3, world=8)
    sizes = [json.loads((stage / name / "index.json").read_text())["shards"] for name in ("code", "math", "web")]
    raw = [[shard["raw_data"]["bytes"] for shard in shards] for shards in sizes]
    for local_ranks, sections, parallel in ((1, 1, {}), (4, 4, {}), (4, 2, {"tensor_parallel": 2}), (99, 8, {})):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
        world = {"world_size": 8 * parallel.get("tensor_parallel", 1), **parallel}
        needed = sum(min(sections * HELD_SHARDS * max(domain), sum(domain)) for domain in raw)
        check_shard_cache(loader, make_spec(tmp_path, needed, **world))
        with pytest.raises(RefusedInput, match=rf"size_bytes = {needed - 1}: .* take {needed}; set it to at least"):
            check_shard_cache(loader, make_spec(tmp_path, needed - 1, **world))


def test_a_cache_folder_that_cannot_be_written_to_is_refused(stage, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RefusedInput, match=r"cannot be written to.*cluster\.shard_cache\.folder"):
        build(stage, tmp_path / "file" / "cache")


def test_the_cache_of_a_recipe_is_that_of_both_loaders(tmp_path):
    spec = make_spec(tmp_path, 12345, world_size=1)
    write_data(spec.data, 300, domains=tuple(spec.stage.mixture), documents=2)
    config = build_stage_config(spec)
    for loader in (config.dataloader, config.validator.dataloader):
        assert (loader.local, loader.cache_bytes) == (str(tmp_path / "cache"), 12345)


def test_a_checkpoint_of_the_older_order_is_refused_and_one_of_this_order_is_not(stage, cache, tmp_path):
    check_loader_order(tmp_path)  # no checkpoint
    loader = build(stage, cache)
    dcp.save({"dataloader": loader}, checkpoint_id=tmp_path / "checkpoint/step-3", no_dist=True)
    check_loader_order(tmp_path)
    old = {"lane_00000_of_00008": "{}", "sequences": 8, "identity": "{}"}
    dcp.save({"dataloader": old}, checkpoint_id=tmp_path / "checkpoint/step-4", no_dist=True)
    with pytest.raises(RefusedInput, match=re.escape(str(tmp_path / "checkpoint/step-4")) + ".*older version"):
        check_loader_order(tmp_path)


def test_a_state_of_the_older_order_is_refused_by_the_loader_itself(stage, cache):
    loader = build(stage, cache)
    sequences([loader], G)
    state = loader.state_dict()
    identity = json.loads(state["identity"])
    del identity["order"]
    with pytest.raises(RefusedInput, match="order: None in the checkpoint, 2 now"):
        build(stage, cache).load_state_dict(state | {"identity": json.dumps(identity)})
