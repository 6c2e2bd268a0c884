"""A stage of real shards, and a cache for them, for the tests of shards and loader."""

import pytest

from tests.titan_ext.launch import start_server
from tests.titan_ext.stage_of_shards import write_stage

start_server()  # collected before any test runs


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return write_stage(tmp_path_factory.mktemp("data") / "pretrain")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")
