"""Run datatrove blocks locally, on Ray or through Slurm, so that a failure is raised and an interrupted step resumes.

datatrove's own `run` methods are not used. Locally its pool waits forever when a worker is killed (out of memory), and
its manager process outlives a killed parent. On Ray it starts a process for every rank, which imports everything
again, does not raise a task's exception, and was seen to hang after all ranks had completed. Its Slurm executor returns
when the jobs are submitted, without waiting for them to end.
"""

import contextlib
import fcntl
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from core.progress import Progress
from data import compat

POLL_SECONDS = 0.5
"""Time between two counts of the completed ranks, for the progress callback."""
MAX_ARRAY_SIZE = 1000
"""Largest number of tasks in one Slurm job array: Slurm's default limit is 1,001."""
PRELOADED_MODULES = ["data.readers.corpus_reader", "data.filters.quality", "data.tokens.shard_writer"]
"""Modules that import the heavy libraries; the fork server imports them once for all workers."""


@functools.cache
def _open_stderr_file(folder: Path) -> TextIO:
    """Open the file that replaces this process's stderr; never closed, because datatrove's logger keeps hold of it."""
    return (folder / f"{os.uname().nodename}.{os.getpid()}.stderr").open("a", buffering=1)


class LocalExecutor(LocalPipelineExecutor):
    """Runs ranks in processes of this machine."""

    def run(self) -> None:
        """Run the ranks that are not completed.

        Raises:
            BrokenProcessPool: a worker was killed.
            Exception: the first exception of a rank.
        """
        ranks = compat.list_incomplete_ranks(self)
        if not ranks:
            return
        # The fork server imports the heavy libraries once; the workers of every step are forked from it.
        multiprocessing.set_forkserver_preload(PRELOADED_MODULES)
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(self.workers, len(ranks)), context, initializer=_exit_with_parent) as pool:
            for future in [pool.submit(self.run_rank, rank) for rank in ranks]:
                future.result()

    def run_rank(self, rank: int) -> None:
        """Run one rank in this process.

        A lock keeps a rank to one process at a time. A worker may outlive its run, and then the next run waits for it
        instead of writing the same files. The output of datatrove and tqdm on stderr goes to a file, because the rank's
        own log holds it too.
        """
        folder = Path(self.logging_dir.path) / "processes"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(_open_stderr_file(folder)), (folder / f"{rank:05d}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            compat.run_rank(self, rank)


def _exit_with_parent() -> None:
    """Let this worker exit when its parent dies.

    Pool workers hold both ends of their queue, so they would otherwise never notice that the parent was killed.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "only pool workers call it"
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class RayExecutor(LocalExecutor):
    """Runs ranks as tasks of one CPU each on the Ray cluster that the caller initialised.

    All nodes see the same folders. Ray keeps the processes between tasks, so they import the heavy libraries once.
    """

    def run(self) -> None:
        """Run the ranks that are not completed; raises the first failure. Ray repeats a rank whose process died."""
        import ray

        task = ray.remote(num_cpus=1)(_run_rank)
        shared = ray.put(self)
        waiting = compat.list_incomplete_ranks(self)
        running: list[ray.ObjectRef] = []
        while waiting or running:
            while waiting and len(running) < self.workers:
                running.append(task.remote(shared, waiting.pop(0)))
            done, running = ray.wait(running)
            ray.get(done)


def _run_rank(executor: RayExecutor, rank: int) -> None:
    executor.run_rank(rank)


class SlurmExecutor(LocalExecutor):
    """Runs ranks as a job array, one CPU a task; all nodes see the same folders, and Python at the same path.

    sbatch reads partition, account and time limit from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
    """

    def run(self) -> None:
        """Submit the ranks that are not completed and wait for them.

        Raises:
            RuntimeError: a job of the array failed.
        """
        folder = Path(self.logging_dir.path) / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        ranks = compat.list_incomplete_ranks(self)
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
    """Run the rank of this task of a Slurm job array."""
    executor, ranks = pickle.loads(Path(job).read_bytes())
    executor.run_rank(ranks[int(os.environ["SLURM_ARRAY_TASK_ID"])])


EXECUTORS = {"local": LocalExecutor, "ray": RayExecutor, "slurm": SlurmExecutor}


@dataclass(frozen=True)
class StepRunner:
    """Runs one named step after another."""

    kind: Literal["local", "ray", "slurm"]
    """Executor that runs the tasks."""
    workers: int
    """Number of tasks that run at once."""
    logs: Path
    """Folder of datatrove's logs, statistics and completion markers, with one folder per step."""
    progress: Progress
    """Called with (step name, completed tasks, all tasks)."""

    def run(self, name: str, blocks: list[PipelineStep], tasks: int) -> None:
        """Run the blocks as `tasks` tasks, leaving out those that are completed.

        Raises:
            RuntimeError: a task failed. The message names the ranks and the logs.
        """
        folder = self.logs / name
        executor = EXECUTORS[self.kind](blocks, tasks=tasks, workers=self.workers, logging_dir=str(folder))
        finished = threading.Event()
        watcher = threading.Thread(target=self._report_progress, args=(name, folder, tasks, finished), daemon=True)
        watcher.start()
        try:
            executor.run()
        except Exception as failure:
            incomplete = compat.list_incomplete_ranks(executor)
            raise RuntimeError(
                f"data step {name!r}: ranks {incomplete} of {tasks} did not complete ({failure!r}); "
                f"see {folder / 'logs'}, then run again: the others are kept"
            ) from failure
        finally:
            finished.set()
            watcher.join()
        incomplete = compat.list_incomplete_ranks(executor)
        assert not incomplete, f"data step {name!r} returned without its completion markers"
        self.progress(name, tasks, tasks)

    def _report_progress(self, name: str, folder: Path, tasks: int, finished: threading.Event) -> None:
        while not finished.wait(POLL_SECONDS):
            self.progress(name, compat.count_completed_ranks(folder), tasks)


if __name__ == "__main__":
    # The pickled executor's class is that of the module data.execution. Run as __main__, this file holds a second copy.
    from data import execution

    execution._run_array_task(sys.argv[1])
