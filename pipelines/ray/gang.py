"""A gang: `world_size` Ray workers that run one function as the ranks of a process group, as under torchrun.

Ray Train's own TorchConfig calls init_process_group, and so does torchtitan's Trainer. The backend here therefore only
sets the environment that torchrun would set, and leaves the process group to the Trainer.
"""

import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.backend import Backend, BackendConfig

from core.environment import prepare_environment
from core.inside import refuse_links
from core.secret_keys import hide_keys
from pipelines.compat import DataParallelTrainer, find_free_address
from pipelines.ray.worker_log import redirect_output

LOOPBACK = "127.0.0.1"
STORE_IS_HOSTED = "TORCHELASTIC_USE_AGENT_STORE"
"""Variable that tells every rank to connect to a store that is open already, as under torchrun."""
_hosted_stores: list[Any] = []
"""Stores that this process keeps open."""


@dataclass
class EnvironmentConfig(BackendConfig):
    """Configuration of the Ray Train backend that sets environment variables and starts no process group."""

    variables: dict[str, str]
    one_machine: bool = False
    """Whether all workers are processes of one machine, and meet where other machines cannot reach them."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return the backend that reads this configuration."""
        return EnvironmentBackend


class EnvironmentBackend(Backend):
    """The backend gives every worker the variables of torchrun.

    These are RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR and MASTER_PORT.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Choose the rendezvous address on rank 0's node. Ray calls this when the workers have started."""
        assert isinstance(backend_config, EnvironmentConfig)
        meet = host_store_on_loopback if backend_config.one_machine else find_free_address
        address, port = worker_group.execute_single(0, meet)
        rendezvous = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        if backend_config.one_machine:
            rendezvous[STORE_IS_HOSTED] = "True"
        worker_group.execute(_set_variables, rendezvous | backend_config.variables)

    def on_training_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Set the ranks. Ray knows them only from this call on."""
        worker_group.execute(_set_ranks)


def host_store_on_loopback() -> tuple[str, int]:
    """Open the store in which the ranks of one machine meet, at 127.0.0.1, and return its address and port.

    torch would let it listen at every address of the machine. This process, that of rank 0, keeps it to its end.
    """
    from torch.distributed import TCPStore

    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    _hosted_stores.append(
        TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    )
    return LOOPBACK, port


def _set_variables(variables: dict[str, str]) -> None:
    prepare_environment()  # a node of a cluster has its own
    os.environ.update(variables)


def _set_ranks() -> None:
    context = ray.train.get_context()
    os.environ.update(
        RANK=str(context.get_world_rank()), WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()), LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )  # fmt: skip


class RankFailed(RuntimeError):
    """A rank's exception as text, because the exception itself may not survive pickling."""


def build_trainer(
    fn: Callable[[Any], None],
    argument: Any,
    *,
    name: str,
    logs: Path,
    environment: dict[str, str],
    worker_environment: dict[str, str],
    scaling: ray.train.ScalingConfig,
    max_failures: int,
    working_directory: str | None,
    one_machine: bool,
) -> DataParallelTrainer:
    """Return a Ray Train trainer whose `fit()` runs `fn(argument)` on every rank.

    Args:
        name: name of the log files below `logs`.
        environment: variables that each worker sets before `fn` is called.
        worker_environment: variables that each worker's process is started with, for what must be known at its start.
        max_failures: number of restarts of the gang before `fit()` raises.
        working_directory: directory that each worker changes to; None leaves Ray's own.
        one_machine: whether all workers are processes of this machine.
    """
    return DataParallelTrainer(
        _run_rank,
        train_loop_config={
            "fn": fn,
            "argument": argument,
            "log": str(logs / name),
            "working_directory": working_directory,
        },
        backend_config=EnvironmentConfig(environment, one_machine),
        scaling_config=scaling,
        # ray.train exports the classes of Train v2 at run time, and those of v1 to type checkers: hence the ignores.
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=name,
            storage_path=str(logs / "ray_train"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=[FailureLog(logs / f"{name}.failures.log")],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": worker_environment},
        ),
    )


def _run_rank(config: dict[str, Any]) -> None:
    if config["working_directory"] is not None:
        os.chdir(config["working_directory"])
    with redirect_output(Path(f"{config['log']}.rank{os.environ['RANK']}.log")):
        try:
            config["fn"](config["argument"])
        except Exception:
            text = hide_keys(traceback.format_exc())
            print(text, flush=True)
            raise RankFailed(text) from None


class FailureLog(ray.train.UserCallback):
    """A callback that appends every failure of a gang to a file, also those after which a restart succeeded."""

    def __init__(self, path: Path):
        self.path = path

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Append the failures. Ray's controller calls this when workers died or raised."""
        with open(self.path, "a", encoding="utf-8", opener=refuse_links) as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}\n{describe_failures(worker_exceptions)}\n")


def describe_failures(failures: dict[int, Exception]) -> str:
    """Return the rank and the original traceback of every failed rank."""
    return hide_keys("\n".join(f"rank {rank}: {str(error).strip()}" for rank, error in sorted(failures.items())))
