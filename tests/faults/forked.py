"""`mobilemoe run` in a forked process, its tasks and ranks forked from it: all of a run but Ray, without an import.

Everything is imported before the first fork, so a whole run takes seconds, and a hundred of them can be disturbed.
What Ray adds is disturbed by `tests.faults.ray_faults`.
"""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import data.execution
import data.pipeline
import data.tokens.shard_writer
import eval.benchmarks.harness
import eval.benchmarks.heldout
import eval.benchmarks.items
import eval.export.gguf_file
import eval.export.int4
import eval.report.run_report  # noqa: F401  imported before the fork, as all of these
import pipelines.commands.run
import pipelines.ray.cluster
import titan_ext.training.train  # noqa: F401
from pipelines.cli import main
from pipelines.ray.cluster import Task, WorkerFailed
from pipelines.ray.gang import RankFailed
from pipelines.ray.worker_log import redirect_output
from pipelines.recipe import ClusterConfig
from tests.faults.injection import Injection, Injector

FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1
WATCH: list[Callable[[str], None]] = []
"""Functions that every process calls with its name when it starts."""


class ForkedCluster(AbstractContextManager):
    """Takes the place of `pipelines.ray.cluster.Cluster`: tasks and ranks are forked from the driver."""

    def __init__(self, config: ClusterConfig, run: Path, world_size: int):
        self.config, self.run, self.world_size = config, run, world_size
        self.local, self.dashboard, self.is_training = True, "none", False
        self._children: list[Any] = []

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill what is still at work."""
        for child in self._children:
            child.kill()

    def check_size(self, **wanted: bool) -> None:
        """Hold everything: nothing is reserved."""

    def count_slots(self, cpus: int, gpus: int) -> int:
        """Return one: tasks run one after the other."""
        return 1

    def run_tasks(self, tasks: list[Task]) -> list[Any]:
        """Run each task in a process of its own, which is started again if it dies, as Ray does."""
        return [self._run_task(task) for task in tasks]

    def _run_task(self, task: Task) -> Any:
        for _ in range(self.config.max_failures + 1):
            receive, send = FORK.Pipe(duplex=False)
            (child,) = self._start([task.log.stem], [(_run_task, task, send)])
            send.close()
            try:
                error, value = receive.recv()
            except EOFError:  # it died
                child.join()
                continue
            child.join()
            if error:
                raise WorkerFailed(error)
            return value
        raise WorkerFailed(f"{task.log.stem}: its process died again and again")

    def run_gang(self, fn: Callable[[Any], None], argument: Any, *, name: str) -> None:
        """Run a gang of ranks, which is started again as a whole if one of them fails."""
        self.is_training = True
        try:
            for _ in range(self.config.max_failures + 1):
                if self._try_gang(fn, argument, name):
                    return
            raise WorkerFailed(f"{name}: failed more than {self.config.max_failures} times")
        finally:
            self.is_training = False

    def _try_gang(self, fn: Callable[[Any], None], argument: Any, name: str) -> bool:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        names = [f"{name}.rank{rank}" for rank in range(self.world_size)]
        work = [(_run_rank, fn, argument, rank, self.world_size, port, self.run / "logs") for rank in range(len(names))]
        ranks = self._start(names, work)
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
            multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=1)
        time.sleep(0.2)  # the others may be about to say why
        for rank in ranks:
            rank.kill()
            rank.join()
        return not any(rank.exitcode for rank in ranks)

    def _start(self, names: Sequence[str], work: Sequence[tuple]) -> list[Any]:
        children = [
            FORK.Process(target=_begin, args=(name, os.getpid(), *words), name=name)
            for name, words in zip(names, work, strict=True)
        ]
        for child in children:
            child.start()
        self._children = children
        return children


def _begin(name: str, driver: int, function: Callable[..., None], *words: Any) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:  # it died before
        os._exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for watch in WATCH:
        watch(name)
    function(name, *words)


def _run_task(name: str, task: Task, send: Any) -> None:
    try:
        with redirect_output(task.log):
            value = task.fn(*task.args)
    except Exception as error:
        traceback.print_exc()
        send.send((f"{type(error).__name__}: {error}", None))
    else:
        send.send(("", value))


def _run_rank(
    name: str, fn: Callable[[Any], None], argument: Any, rank: int, world: int, port: int, logs: Path
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with redirect_output(logs / f"{name}.log"):
        try:
            fn(argument)
        except Exception:
            traceback.print_exc()
            raise RankFailed(name) from None


def start_driver(
    words: Sequence[str], log: Path, injection: Injection | None = None, marker: Path | None = None
) -> Any:
    """Fork `mobilemoe WORDS` into a session of its own; the caller joins it.

    Args:
        injection: the fault that one of its processes inflicts on itself.
        marker: file that says that it has.
    """
    process = FORK.Process(target=_drive, args=(list(words), log, injection, marker))
    process.start()
    return process


def _drive(words: list[str], log: Path, injection: Injection | None, marker: Path | None) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    data.execution.multiprocessing.get_context = lambda _=None: FORK
    pipelines.ray.cluster.Cluster = ForkedCluster
    if injection:
        assert marker is not None
        WATCH.append(Injector(injection, marker, os.getpid()).enter)
    for watch in WATCH:
        watch("driver")
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the daemon threads of an interrupted run are not waited for
