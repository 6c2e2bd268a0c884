"""Run datatrove blocks, locally or on Ray, so that a failure is raised and an interruption resumes.

datatrove's own `run` methods are not used. Locally its pool waits for ever when a worker is killed (out of memory), and
its manager process outlives a killed parent. On Ray it starts a process for every rank, which imports everything
again, does not raise a task's exception, and was seen to hang after all ranks had completed.
"""

import contextlib
import fcntl
import functools
import importlib.metadata  # noqa: F401  datatrove's dependency check uses this submodule without importing it
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats

Report = Callable[[str, int, int], None]
"""report(phase, done, total)"""

POLL_SECONDS = 0.5


@functools.cache
def _noise_file(folder: Path) -> TextIO:
    """Where this process's stderr goes; never closed, because datatrove's logger keeps hold of it."""
    return (folder / f"{os.uname().nodename}.{os.getpid()}.stderr").open("a", buffering=1)


class LocalExecutor(LocalPipelineExecutor):
    """Processes of this machine."""

    def run(self) -> None:
        """Run the ranks that are not done; raises the first failure, or BrokenProcessPool for a killed worker."""
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        # The server imports the heavy libraries once; every step's workers are forked from it.
        multiprocessing.set_forkserver_preload(["data.blocks", "data.filters", "data.mds"])
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(self.workers, len(ranks)), context, initializer=_die_with_parent) as pool:
            for future in [pool.submit(self._run_for_rank, rank) for rank in ranks]:
                future.result()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        """One rank, in one process at a time: a worker that outlives its run keeps the lock until it ends.

        What datatrove and tqdm say on stderr goes to a file; the rank's log has it all.
        """
        folder = Path(self.logging_dir.path) / "processes"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(_noise_file(folder)), (folder / f"{rank:05d}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return super()._run_for_rank(rank, max(1, local_rank), node_rank)


def _die_with_parent() -> None:
    """Pool workers hold both ends of their queue, so nothing else tells them that the parent was killed."""

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class RayExecutor(LocalExecutor):
    """Tasks of the Ray cluster that the caller initialised, a CPU each; all nodes see the same folders.

    Ray keeps the processes between tasks, so they import the heavy libraries once.
    """

    def run(self) -> None:
        """Run the ranks that are not done; raises the first failure, and Ray repeats a rank whose process died."""
        import ray

        task = ray.remote(num_cpus=1)(_run_rank)
        shared = ray.put(self)
        waiting, running = self.get_incomplete_ranks(), []
        while waiting or running:
            while waiting and len(running) < self.workers:
                running.append(task.remote(shared, waiting.pop(0)))
            done, running = ray.wait(running)
            ray.get(done)


def _run_rank(executor: RayExecutor, rank: int) -> None:
    executor._run_for_rank(rank)


EXECUTORS = {"local": LocalExecutor, "ray": RayExecutor}


@dataclass(frozen=True)
class Runner:
    """Runs one named step after another.

    Attributes:
        logs: folder of datatrove's logs, statistics and completion markers, one folder a step.
    """

    kind: Literal["local", "ray"]
    workers: int
    logs: Path
    report: Report

    def run(self, name: str, blocks: list[PipelineStep], tasks: int) -> None:
        """Run the blocks as `tasks` tasks, or those of them that are not done yet.

        Raises:
            RuntimeError: a task failed; names the ranks and the log.
        """
        folder = self.logs / name
        executor = EXECUTORS[self.kind](blocks, tasks=tasks, workers=self.workers, logging_dir=str(folder))
        finished = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(name, folder, tasks, finished), daemon=True)
        watcher.start()
        try:
            executor.run()
        except Exception as failure:
            incomplete = executor.get_incomplete_ranks()
            raise RuntimeError(
                f"data step {name!r}: ranks {incomplete} of {tasks} did not complete ({failure!r}); "
                f"see {folder / 'logs'}, then run again: the others are kept"
            ) from failure
        finally:
            finished.set()
            watcher.join()
        assert not executor.get_incomplete_ranks(), f"data step {name!r} returned without its completion markers"
        self.report(name, tasks, tasks)

    def _watch(self, name: str, folder: Path, tasks: int, finished: threading.Event) -> None:
        while not finished.wait(POLL_SECONDS):
            self.report(name, len(list(folder.glob("completions/*"))), tasks)
