"""A stage of real shards, and a cache for them, for the tests of shards and loader."""

import pytest

from tests.titan_ext.stage_of_shards import write_stage
from titan_ext.training.launch import start_fork_server

# Before any test of the data step starts the process's one fork server without torchtitan.
start_fork_server(preload=["data.readers.corpus_reader", "data.filters.quality", "data.tokens.shard_writer"])


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("data") / "pretrain")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")
