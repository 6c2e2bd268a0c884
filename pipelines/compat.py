"""Everything that this room takes from Ray's private modules. tests/pipelines/test_contracts.py holds each to Ray 2.60.

Importing this module imports Ray.
"""

from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = ["LOCAL_RAY_TRAIN", "DataParallelTrainer", "find_free_address", "start_local_ray"]

LOCAL_RAY_TRAIN = {HEALTH_CHECK_INTERVAL_S_ENV_VAR: "0.5", ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0"}
"""Environment of gangs on a Ray started here. Ray Train's own interval of the health check adds 2 s to the end of every
stage. Nothing preempts the children of a driver, so the process that would watch for it is not started."""


def find_free_address() -> tuple[str, int]:
    """Return the address of this node and a free port on it; run on rank 0, where the process group meets."""
    return get_address_and_port()


def start_local_ray(temporary_folder: str, **options: Any) -> Any:
    """Start Ray as children of this process, with sockets and logs below `temporary_folder`.

    Ray's own choice is a fixed folder below /tmp, which is shared with every other Ray of the machine and stays when
    the driver is killed. The option has no public name in `ray.init`, only in `ray start`.
    """
    return ray.init(
        address="local",  # RAY_ADDRESS, or another Ray of this machine, must not be joined
        _temp_dir=temporary_folder,
        **options,
    )
