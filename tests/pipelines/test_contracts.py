"""The private parts of Ray that pipelines/compat.py takes: each is where it was and still does what is asked of it."""

import inspect
import shutil
import tempfile
from pathlib import Path

import psutil
import ray
from ray.train.v2._internal import constants
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines import compat


def test_address_and_port_of_the_rendezvous():
    """If this fails, gangs get no MASTER_ADDR and MASTER_PORT: `ray.train._internal.utils.get_address_and_port`."""
    address, port = compat.find_free_address()
    addresses = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    assert address in addresses
    assert 0 < port < 65536


def test_constants_are_the_variables_that_ray_train_reads():
    """If this fails, stages of a local run end 2 s later, or start a process that watches for preemption: Ray Train
    reads other variables than LOCAL_RAY_TRAIN sets."""
    assert compat.LOCAL_RAY_TRAIN == {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }  # fmt: skip
    assert constants.DEFAULT_HEALTH_CHECK_INTERVAL_S > 0.5


def test_trainer_takes_a_backend_of_our_own():
    """If this fails, gangs cannot run without Ray's process group: `DataParallelTrainer` of Ray Train v2 has moved or
    no longer takes a `backend_config`."""
    parameters = inspect.signature(DataParallelTrainer).parameters
    wanted = {"train_loop_per_worker", "train_loop_config", "backend_config", "scaling_config", "run_config"}
    assert wanted <= parameters.keys()


def test_temporary_folder_of_a_local_ray():
    """If this fails, the folder of a killed driver's Ray stays: `ray.init(_temp_dir=...)` no longer decides where
    sessions lie."""
    folder = Path(tempfile.mkdtemp())  # short, as the sockets below it need
    try:
        compat.start_local_ray(str(folder), num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)
        assert [path for path in folder.iterdir() if path.name.startswith("session_")]
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


def test_ray_train_waits_a_minute_for_the_workers_of_a_gang():
    """If this fails, a gang whose processes take half a minute to start is taken down and begun again for ever (ray
    #60376); set RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S."""
    assert constants.DEFAULT_WORKER_GROUP_START_TIMEOUT_S >= 60
