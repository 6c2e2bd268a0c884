"""Everything that this room takes from Ray's private modules. tests/pipelines/test_contracts.py holds each to Ray 2.60.

Importing this module imports Ray.
"""

from typing import Any

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without types
from ray.train._internal.utils import get_address_and_port
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = ["LOCAL_RAY_TRAIN", "DataParallelTrainer", "find_free_address", "reread_token", "start_local_ray"]

LOCAL_RAY_TRAIN = {HEALTH_CHECK_INTERVAL_S_ENV_VAR: "0.5", ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0"}
"""Environment of gangs on a Ray started here. Ray Train's own interval of the health check adds 2 s to the end of every
stage. Nothing preempts the children of a driver, so the process that would watch for it is not started."""


def find_free_address() -> tuple[str, int]:
    """Return the address of this node and a free port on it; run on rank 0, where the process group meets."""
    return get_address_and_port()


def start_local_ray(temporary_folder: str, **options: Any) -> Any:
    """Start Ray as children of this process, with sockets and logs below `temporary_folder`, on loopback alone.

    Ray's own choice is a fixed folder below /tmp, which is shared with every other Ray of the machine and stays when
    the driver is killed. The option has no public name in `ray.init`, only in `ray start`. Its servers listen at every
    address of the machine, except where Ray knows that no other machine can join. That it knows on Windows and macOS,
    and nowhere else: `_node_ip_address="127.0.0.1"` is replaced by the machine's address.
    """
    joins_machines = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    reread_token()
    try:
        return ray.init(
            address="local",  # RAY_ADDRESS, or another Ray of this machine, must not be joined
            _temp_dir=temporary_folder,
            **options,
        )
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = joins_machines


def reread_token() -> None:
    """Let Ray read from the environment again whether there is a token, and which: it reads both once a process."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
