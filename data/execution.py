"""Run datatrove blocks, locally, on Ray or through Slurm, so that a failure is raised and an interruption resumes.

datatrove's own `run` methods are not used. Locally its pool waits for ever when a worker is killed (out of memory), and
its manager process outlives a killed parent. On Ray it starts a process for every rank, which imports everything
again, does not raise a task's exception, and was seen to hang after all ranks had completed. Its Slurm executor returns
when the jobs are submitted, which says nothing about how they ended.
"""

import contextlib
import fcntl
import functools
import importlib.metadata  # noqa: F401  datatrove's dependency check uses this submodule without importing it
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shlex
import subprocess
import sys
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
MAX_ARRAY_SIZE = 1000
"""Of a job array: Slurm's default limit is 1,001."""


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
        multiprocessing.set_forkserver_preload(
            ["data.readers.blocks", "data.filters.quality", "data.tokens.shard_writer"]
        )
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


class SlurmExecutor(LocalExecutor):
    """A job array, a CPU a task; all nodes see the same folders, and python at the same path.

    Partition, account and time limit are what the SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT of the
    environment say, as sbatch reads them.
    """

    def run(self) -> None:
        """Submit the ranks that are not done and wait for them; raises RuntimeError where a job of the array failed."""
        folder = Path(self.logging_dir.path) / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        ranks = self.get_incomplete_ranks()
        for first in range(0, len(ranks), MAX_ARRAY_SIZE):
            job = folder / f"array_{first:06d}.pickle"
            job.write_bytes(pickle.dumps((self, ranks[first : first + MAX_ARRAY_SIZE])))
            last = min(MAX_ARRAY_SIZE, len(ranks) - first) - 1
            command = [
                "sbatch", "--wait", f"--array=0-{last}%{self.workers}", "--ntasks=1", "--cpus-per-task=1",
                f"--output={folder}/%A_%a.out", "--job-name=mobilemoe-data",
                f"--wrap={shlex.join([sys.executable, '-m', 'data.execution', str(job)])}",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"sbatch ended with {done.returncode}: {done.stderr.strip()}; see {folder}")


def _run_array_task(job: str) -> None:
    """In a job of the array: its rank."""
    executor, ranks = pickle.loads(Path(job).read_bytes())
    executor._run_for_rank(ranks[int(os.environ["SLURM_ARRAY_TASK_ID"])])


EXECUTORS = {"local": LocalExecutor, "ray": RayExecutor, "slurm": SlurmExecutor}


@dataclass(frozen=True)
class Runner:
    """Runs one named step after another.

    Attributes:
        logs: folder of datatrove's logs, statistics and completion markers, one folder a step.
    """

    kind: Literal["local", "ray", "slurm"]
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


if __name__ == "__main__":
    # Pickled classes are those of the importable module, not of __main__.
    from data import execution

    execution._run_array_task(sys.argv[1])
