"""`Cluster`: the Ray of a run, started here or joined by its address, with tasks and gangs on it."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train

from core.cpus import count_cpus
from core.environment import find_socket_folder, prepare_environment
from core.errors import RefusedInput
from pipelines.compat import LOCAL_RAY_TRAIN, reread_token, start_local_ray
from pipelines.ray import orphan_reaper
from pipelines.ray.access import RAY_FOLDER, TOKEN_FILE, Variables, close_to_others, set_variables
from pipelines.ray.gang import build_trainer, describe_failures
from pipelines.ray.temporary_folder import enter_temporary_folder, leave_temporary_folder, make_temporary_folder
from pipelines.ray.worker_log import redirect_output
from pipelines.recipe import ClusterConfig
from titan_ext.cpu.allocator import allocator_environment

FOLDER_PREFIX = "mobilemoe-ray-"
"""Beginning of the name of the folder of a Ray started here."""
LONGEST_FOLDER = 107 - len(f"/{RAY_FOLDER}/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store")
"""Bytes of the longest folder below which Ray's sockets can have their paths."""
OBJECT_STORE_BYTES = 256 << 20
"""Size of the object store of a Ray started here. Configurations and results pass through it, never data."""


START_SECONDS = 300.0
"""Time that one start of Ray may take. A quiet machine needs 5 s, one with 30 busy processes to 2 cores needs 60."""
START_ATTEMPTS = 3
"""How often Ray is started where it fails. On a machine under load its own half minute for the raylet runs out."""


class WorkerFailed(RuntimeError):
    """Work on the cluster raised or died; the message holds the rank and the original traceback."""


@dataclass(frozen=True)
class Task:
    """One call `fn(*args)` on a Ray worker, with its output in `log`."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    log: Path
    num_cpus: int
    num_gpus: int = 0


class Cluster(contextlib.AbstractContextManager):
    """A connection to Ray for one run; what it started ends with it.

    A Ray started here is a set of child processes, watched by `pipelines.ray.orphan_reaper`: after a SIGKILL of the
    driver nothing is left within seconds. On a cluster by address Ray itself ends the job of a driver that died.
    """

    def __init__(self, config: ClusterConfig, run: Path, world_size: int):
        self.config, self.run, self.world_size = config, run, world_size
        self.local = config.ray_address == ""
        self.dashboard = "none"
        """Address of the dashboard and, of a Ray started here, how to read the token that it asks for."""
        self._former_access: Variables = {}
        self._token_hint = ""
        self._gangs, self._lock = 0, threading.Lock()
        self._reaper: subprocess.Popen | None = None
        self._working_directory = os.getcwd() if self.local else None
        """Directory that workers on this machine change to: a recipe's paths may be relative to it."""

    def __enter__(self) -> "Cluster":
        try:
            context = self._start() if self.local else self._join()
        except BaseException:  # the block is never entered, so its end does not close what was started
            self.close()
            raise
        if context.dashboard_url:
            self.dashboard = f"http://{context.dashboard_url}{self._token_hint}"
        return self

    def _join(self) -> Any:
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
            return ray.init(address=self.config.ray_address, log_to_driver=False)

    def _start(self) -> Any:
        # Only the holder of the run's lock comes here, so processes marked with this run belong to a dead driver.
        orphan_reaper.end_processes(self.run)
        parent = find_socket_folder(LONGEST_FOLDER - len(f"/{FOLDER_PREFIX}12345678"))
        if parent is None:
            raise RefusedInput(
                f"no folder for Ray's sockets: their paths have at most 107 bytes, and neither TMPDIR "
                f"({tempfile.gettempdir()}) nor /tmp, /var/tmp and /dev/shm can be used; set TMPDIR to a folder with a "
                f"path of at most {LONGEST_FOLDER - len(FOLDER_PREFIX) - 9} bytes that can be written"
            )
        folder, temporary = tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent), make_temporary_folder()
        marker = orphan_reaper.make_marker(self.run)
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "pipelines.ray.orphan_reaper", marker, folder, str(temporary)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C of the terminal goes to the driver's process group, not to the reaper
        )
        enter_temporary_folder(temporary)
        os.environ[orphan_reaper.MARKER_VARIABLE] = marker
        os.environ |= LOCAL_RAY_TRAIN
        self._former_access = close_to_others(Path(folder))
        self._token_hint = f" (token: cat {folder}/{TOKEN_FILE})"
        for attempt in range(1, START_ATTEMPTS + 1):
            deadline = threading.Timer(START_SECONDS, _give_up)
            deadline.daemon = True
            deadline.start()
            try:
                return self._start_once(folder)
            except Exception:  # plain ones: a time ran out, a part of Ray was killed, a port is taken
                if attempt == START_ATTEMPTS:
                    raise
            finally:
                deadline.cancel()
            ray.shutdown()
            orphan_reaper.end_processes(self.run)  # of this attempt
        raise AssertionError("the last attempt returns or raises")

    def _start_once(self, folder: str) -> Any:
        config = self.config
        # Ray puts the working directory of this call at the front of every worker's module path. There a `data.py` of
        # the user would be imported in place of ours, so the call is made from Ray's own folder.
        with contextlib.chdir(folder):
            return start_local_ray(
                f"{folder}/{RAY_FOLDER}",
                num_cpus=max(count_cpus(), self.world_size * config.cpus_per_worker, config.cpus_per_task),
                include_dashboard=True,
                dashboard_port=config.dashboard_port or None,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
            )

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here. Work that still runs on it raises in its caller."""
        ray.shutdown()
        if self._reaper:
            # This closes the reaper's standard input; it ends what is left, removes the folders and exits.
            leave_temporary_folder()
            self._reaper.communicate()
            self._reaper = None  # an interrupt closes the cluster, and so does the end of the block
            os.environ.pop(orphan_reaper.MARKER_VARIABLE, None)
            set_variables(self._former_access)
            reread_token()

    def check_size(self, *, trains: bool = True, evaluates: bool = False) -> None:
        """Check that the cluster can hold a task, and the gang if there is training to do.

        Export, evaluation and report need no gang: they continue a run on a cluster of any size.

        Args:
            evaluates: whether tasks need a GPU where a training rank does.

        Raises:
            RefusedInput: the cluster is too small; the message says what is wanted and what the cluster has.
        """
        self._check_task(self.config.gpus_per_worker if evaluates else 0)
        if trains:
            self._check_gang()

    def _check_task(self, gpus: int) -> None:
        """Refuse a cluster of which no node holds a task: Ray would wait for ever for one that does."""
        cpus = self.config.cpus_per_task
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            largest = max((node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
            way_out = "lower cluster.cpus_per_task"
            if gpus:
                way_out += ", or evaluate on CPUs with --cluster.gpus-per-worker 0"
            raise RefusedInput(
                f"cluster.cpus_per_task = {cpus} and {gpus} GPU: no node of the Ray cluster has as many, the largest "
                f"has {largest[0]:.0f} CPU and {largest[1]:.0f} GPU; give it a larger node, {way_out}"
            )

    def _check_gang(self) -> None:
        present = ray.cluster_resources()
        for kind, each in (("CPU", self.config.cpus_per_worker), ("GPU", self.config.gpus_per_worker)):
            wanted, has = each * self.world_size, int(present.get(kind, 0))
            if wanted > has:
                raise RefusedInput(
                    f"cluster.{kind.lower()}s_per_worker x parallel.world_size = {each} x {self.world_size} = {wanted} "
                    f"{kind}: the Ray cluster has {has}; start more nodes, or lower parallel.world_size"
                )

    def count_resources(self) -> tuple[float, float]:
        """Return the number of CPUs and of GPUs of the whole cluster."""
        present = ray.cluster_resources()
        return present.get("CPU", 0.0), present.get("GPU", 0.0)

    def count_slots(self, cpus: int, gpus: int) -> int:
        """Return how many tasks with `cpus` and `gpus` each the whole cluster runs at once, at least one."""
        all_cpus, all_gpus = self.count_resources()
        return max(1, int(min(all_cpus // cpus, all_gpus // gpus if gpus else all_cpus)))

    def run_tasks(self, tasks: list[Task]) -> list[Any]:
        """Run tasks at once, as many as the cluster's resources hold, and return their results in order.

        A task whose worker dies is started again up to `max_failures` times; one that raises is not.

        Raises:
            WorkerFailed: the first failure; the other tasks are cancelled.
        """
        remote = ray.remote(_run_logged)
        refs = [
            remote.options(num_cpus=task.num_cpus, num_gpus=task.num_gpus, max_retries=self.config.max_failures).remote(
                task.fn, task.args, task.log, self._working_directory
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

        A worker that dies or raises ends the gang. Ray starts it again up to `max_failures` times, and `fn` resumes by
        itself. Each rank's output goes to logs/NAME.rankR.log, every failure to logs/NAME.failures.log.

        Raises:
            WorkerFailed: the gang failed more than `max_failures` times; the message has each failed rank's traceback.
        """
        logs = self.run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        gpus = self.config.gpus_per_worker
        trainer = build_trainer(
            fn,
            argument,
            name=name,
            logs=logs,
            environment=self._gang_environment(),
            # The dynamic linker reads the preloaded allocator when the process starts, so it cannot be set later.
            worker_environment={} if gpus else allocator_environment(),
            scaling=ray.train.ScalingConfig(
                num_workers=self.world_size,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": self.config.cpus_per_worker, "GPU": gpus},
            ),
            max_failures=self.config.max_failures,
            working_directory=self._working_directory,
            one_machine=self.local,
        )
        self._count_gangs(+1)
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise WorkerFailed(describe_failures(error.worker_failures)) from error
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            raise WorkerFailed(str(error)) from error
        finally:
            self._count_gangs(-1)

    @property
    def is_training(self) -> bool:
        """Return whether a gang is at work."""
        return self._gangs > 0

    def _count_gangs(self, change: int) -> None:
        with self._lock:
            self._gangs += change

    def _gang_environment(self) -> dict[str, str]:
        variables = {"OMP_NUM_THREADS": str(self.config.cpus_per_worker)}
        if self.local:  # a laptop's hostname may resolve to an address that no interface has
            variables |= {"GLOO_SOCKET_IFNAME": "lo"}
        return variables


def _give_up() -> None:
    """End this process: one of Ray's that was killed while it started leaves `ray.init` waiting for ever, in C++."""
    print(
        f"failed: Ray did not start within {START_SECONDS:.0f} s, perhaps a process of it was killed; the same command "
        "tries again",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)  # the reaper ends what was started


def _run_logged(fn: Callable[..., Any], args: tuple[Any, ...], log: Path, working_directory: str | None) -> Any:
    prepare_environment()  # a node of a cluster has its own
    if working_directory is not None:
        os.chdir(working_directory)
    with redirect_output(log):
        return fn(*args)
