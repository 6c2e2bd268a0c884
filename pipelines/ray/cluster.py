"""Ray: a cluster of our own or one by address, tasks on it, and gangs of training workers.

Ray Train's own TorchConfig calls init_process_group; torchtitan's Trainer calls it too. So the backend here only sets
the environment that torchrun would set, and leaves the process group to the Trainer.
"""

import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train._internal.utils
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR, HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from core.errors import RefusedInput
from pipelines.engine.progress_file import redirect_output
from pipelines.ray import orphan_reaper
from pipelines.recipe import ClusterConfig
from titan_ext.cpu.allocator import allocator_environment

OBJECT_STORE_BYTES = 256 << 20
"""Of a Ray started here: what passes through it are configurations and results, no data."""
LOCAL_RAY_TRAIN = {HEALTH_CHECK_INTERVAL_S_ENV_VAR: "0.5", ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0"}
"""For gangs of a Ray started here. Ray Train's own interval adds 2 s to the end of every stage, and nothing preempts a
driver's children, so the process that would watch for it need not be started."""


class WorkerFailed(RuntimeError):
    """Work on the cluster raised or died; the message holds the rank and the original traceback."""


@dataclass(frozen=True)
class Task:
    """A function for one Ray worker: `fn(*args)`, its output in `log`."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    log: Path
    num_cpus: int
    num_gpus: int = 0


class Cluster(AbstractContextManager):
    """A connection to Ray for one run; what it starts ends with it.

    A Ray started here is a set of child processes, watched by a guard (`pipelines.ray.orphan_reaper`): after a SIGKILL of the
    driver nothing is left within seconds. On a cluster by address Ray itself ends the job of a driver that died.
    """

    def __init__(self, config: ClusterConfig, run: Path, world_size: int):
        self.config, self.run, self.world_size = config, run, world_size
        self.local = config.ray_address == ""
        self.dashboard_url = ""
        self._guard: subprocess.Popen | None = None

    def __enter__(self) -> "Cluster":
        address = self.config.ray_address
        context = self._start() if self.local else ray.init(address=address, log_to_driver=False)
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        return self

    def _start(self) -> Any:
        orphan_reaper.end_processes_of(f"{self.run}#")  # only the holder of the run's lock comes here
        folder = tempfile.mkdtemp(prefix="mobilemoe-ray-")  # short, since the paths of sockets end at 107 bytes
        value = orphan_reaper.marker(self.run)
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "pipelines.ray.orphan_reaper", value, folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        os.environ[orphan_reaper.MARKER] = value
        os.environ |= LOCAL_RAY_TRAIN
        config = self.config
        return ray.init(
            address="local",  # whatever RAY_ADDRESS or another Ray of this machine would have it join
            num_cpus=max(os.cpu_count() or 1, self.world_size * config.cpus_per_worker, config.cpus_per_task),
            include_dashboard=True,
            dashboard_port=config.dashboard_port or None,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            _temp_dir=folder,
        )

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here; whatever still runs on it raises in its caller."""
        ray.shutdown()
        if self._guard:
            self._guard.communicate()  # closes its input: it ends stragglers, removes the folder and leaves
            os.environ.pop(orphan_reaper.MARKER, None)

    def check_size(self) -> None:
        """Refuse a cluster that can never hold the gang.

        Raises:
            RefusedInput: with what is wanted and what there is.
        """
        there = ray.cluster_resources()
        for kind, each in (("CPU", self.config.cpus_per_worker), ("GPU", self.config.gpus_per_worker)):
            wanted, has = each * self.world_size, int(there.get(kind, 0))
            if wanted > has:
                raise RefusedInput(
                    f"cluster.{kind.lower()}s_per_worker x parallel.world_size = {each} x {self.world_size} = {wanted} "
                    f"{kind}: the Ray cluster has {has}; start more nodes, or lower parallel.world_size"
                )

    def run_tasks(self, tasks: list[Task]) -> list[Any]:
        """Run tasks at once, as many as the cluster's resources hold; their results, in order.

        Raises:
            WorkerFailed: the first failure; the other tasks are cancelled.
        """
        remote = ray.remote(_run_logged)
        refs = [
            remote.options(num_cpus=task.num_cpus, num_gpus=task.num_gpus, max_retries=self.config.max_failures).remote(
                task.fn, task.args, task.log
            )
            for task in tasks
        ]
        try:
            return ray.get(refs)
        except ray.exceptions.RayError as error:
            for ref in refs:
                ray.cancel(ref, force=True)
            raise WorkerFailed(str(error)) from error

    def run_gang(self, fn: Callable[[Any], None], argument: Any, *, name: str) -> None:
        """Run `fn(argument)` on every rank of a gang of `world_size` workers, as torchrun would.

        A worker that dies or raises ends the gang; Ray starts it again up to `max_failures` times and `fn` resumes by
        itself. Each rank's output goes to logs/NAME.rankR.log, every failure to logs/NAME.failures.log.

        Raises:
            WorkerFailed: out of restarts; holds each failed rank's traceback.
        """
        logs = self.run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        trainer = DataParallelTrainer(
            _run_rank,
            train_loop_config={"fn": fn, "argument": argument, "log": str(logs / name)},
            backend_config=EnvironmentConfig(self._environment()),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.world_size,
                use_gpu=self.config.gpus_per_worker > 0,
                resources_per_worker={"CPU": self.config.cpus_per_worker, "GPU": self.config.gpus_per_worker},
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=str(logs / "ray_train"),
                failure_config=ray.train.FailureConfig(max_failures=self.config.max_failures),
                callbacks=[FailureLog(logs / f"{name}.failures.log")],
                worker_runtime_env={"env_vars": {} if self.config.gpus_per_worker else allocator_environment()},
            ),
        )
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise WorkerFailed(describe_failures(error.worker_failures)) from error
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise WorkerFailed(str(error)) from error

    def _environment(self) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self.config.cpus_per_worker)}
        if self.local:  # a laptop's hostname may resolve to an address that no interface has
            variables |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
        return variables


@dataclass
class EnvironmentConfig(BackendConfig):
    """Ray Train backend that sets environment variables and starts no process group."""

    variables: dict[str, str]

    @property
    def backend_cls(self) -> type[Backend]:
        """The backend that reads this configuration."""
        return EnvironmentBackend


class EnvironmentBackend(Backend):
    """Gives every worker what torchrun would: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, ..._PORT."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: EnvironmentConfig) -> None:
        """Choose the rendezvous address on rank 0's node."""
        address, port = worker_group.execute_single(0, ray.train._internal.utils.get_address_and_port)
        rendezvous = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        worker_group.execute(_set_variables, rendezvous | backend_config.variables)

    def on_training_start(self, worker_group: Any, backend_config: EnvironmentConfig) -> None:
        """Set the ranks, known from here on."""
        worker_group.execute(_set_ranks)


def _set_variables(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _set_ranks() -> None:
    context = ray.train.get_context()
    os.environ.update(
        RANK=str(context.get_world_rank()), WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()), LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )  # fmt: skip


class RankFailed(RuntimeError):
    """A rank's exception as text, since the exception itself may not survive pickling."""


def _run_rank(config: dict[str, Any]) -> None:
    with redirect_output(Path(f"{config['log']}.rank{os.environ['RANK']}.log")):
        try:
            config["fn"](config["argument"])
        except Exception:
            text = traceback.format_exc()
            print(text, flush=True)
            raise RankFailed(text) from None


def _run_logged(fn: Callable[..., Any], args: tuple[Any, ...], log: Path) -> Any:
    with redirect_output(log):
        return fn(*args)


class FailureLog(ray.train.UserCallback):
    """Appends every failure of a gang, also one that a restart mends, to a file."""

    def __init__(self, path: Path):
        self.path = path

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray's controller when workers died or raised."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')}\n{describe_failures(worker_exceptions)}\n")


def describe_failures(failures: dict[int, Exception]) -> str:
    """Rank, then the original traceback, for every failed rank."""
    return "\n".join(f"rank {rank}: {str(error).strip()}" for rank, error in sorted(failures.items()))
