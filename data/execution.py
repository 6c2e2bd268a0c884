"""Run datatrove blocks locally, on Ray or through Slurm. All ranks run, failures are named, and a step resumes.

datatrove's own `run` methods are not used. Locally its pool waits forever when a worker is killed (out of memory), and
its manager process outlives a killed parent. On Ray it starts a process for every rank, which imports everything
again, does not raise a task's exception, and was seen to hang after all ranks had completed. Its Slurm executor returns
when the jobs are submitted, without waiting for them to end.
"""

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from core.errors import RefusedInput
from core.inside import refuse_links
from core.lease import hold_lock
from core.progress import Progress
from data import compat

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Time between two counts of the completed ranks, for the progress callback."""
MAX_TRIES = 2
"""How often a rank is started whose process dies."""
MAX_SHOWN_FAILURES = 10
"""Largest number of failed ranks whose errors the message of a step states."""
MAX_ARRAY_SIZE = 1000
"""Largest number of tasks in one Slurm job array: Slurm's default limit is 1,001."""
PRELOADED_MODULES = ["data.readers.corpus_reader", "data.filters.quality", "data.tokens.shard_writer"]
"""Modules that import the heavy libraries; the fork server imports them once for all workers."""


@functools.cache
def _open_stderr_file(folder: Path) -> TextIO:
    """Open the file that replaces this process's stderr; never closed, because datatrove's logger keeps hold of it."""
    name = f"{os.uname().nodename}.{os.getpid()}.stderr"
    return open(folder / name, "a", buffering=1, opener=refuse_links)


class LocalExecutor(LocalPipelineExecutor):
    """Runs ranks in processes of this machine."""

    def __init__(self, blocks: list[PipelineStep], tasks: int, workers: int, logging_dir: Path):
        super().__init__(blocks, tasks=tasks, workers=workers, logging_dir=compat.LocalFolder(logging_dir))
        self.sizes: Sequence[float] = ()
        """Work of each rank, in any unit; empty where it is not known."""
        self.consumed: Path | None = None
        """Folder of the ranks' input files, which this step is the last to read."""

    def list_waiting(self) -> list[int]:
        """Return the ranks that are not completed, the largest first: no large one is left alone at the end."""
        ranks = compat.list_incomplete_ranks(self)
        return sorted(ranks, key=lambda rank: -self.sizes[rank]) if self.sizes else ranks

    def run(self) -> Iterator[tuple[int, str]]:
        """Run all ranks that are not completed; yield (rank, error) of each one that failed, when it has failed.

        Every worker has a pool of its own. So a worker that is killed takes no other rank with it, and it is known
        which rank it ran. That rank is tried again, because another process may have taken the memory.
        """
        waiting = self.list_waiting()
        # The fork server imports the heavy libraries once; the workers of every step are forked from it.
        multiprocessing.set_forkserver_preload(PRELOADED_MODULES)
        tries: Counter[int] = Counter()
        running: dict[Future, tuple[int, ProcessPoolExecutor]] = {}
        idle = [_make_pool() for _ in range(min(self.workers, len(waiting)))]
        pools = list(idle)
        try:
            while waiting or running:
                while waiting and idle:
                    rank, pool = waiting.pop(0), idle.pop()
                    tries[rank] += 1
                    running[pool.submit(self.try_rank, rank)] = rank, pool
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    rank, pool = running.pop(future)
                    failure = future.exception()
                    if isinstance(failure, BrokenProcessPool):
                        pools.remove(pool)
                        pool = _make_pool()
                        pools.append(pool)
                        if tries[rank] < MAX_TRIES:
                            waiting.append(rank)
                        else:
                            yield rank, f"its process was killed {MAX_TRIES} times (out of memory?)"
                    elif error := repr(failure) if failure else future.result():
                        yield rank, error
                    idle.append(pool)
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def try_rank(self, rank: int) -> str | None:
        """Run one rank in this process; return its error, or None where it completed.

        The error is a text, because the exceptions of some libraries cannot be sent to another process. The rank's own
        log has the traceback.
        """
        try:
            self.run_rank(rank)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def run_rank(self, rank: int) -> None:
        """Run one rank in this process.

        A lock keeps a rank to one process at a time. A worker may outlive its run, and then the next run waits for it
        instead of writing the same files. The output of datatrove and tqdm on stderr goes to a file, because the rank's
        own log holds it too.
        """
        folder = Path(self.logging_dir.path) / "processes"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{rank:05d}.lock"
        with (
            contextlib.redirect_stderr(_open_stderr_file(folder)),
            open(path, "w", opener=refuse_links) as lock,
            hold_lock(lock, path.with_suffix(".lease")),
        ):
            compat.run_rank(self, rank)
        self.empty_input(rank)

    def empty_input(self, rank: int) -> None:
        """Empty the input file of a completed rank, which nothing reads again, to free its room.

        The empty file stays, so that a rank that lost its completion marker fails instead of finding no document.
        """
        if self.consumed is not None and (path := self.consumed / compat.rank_file(rank)).exists():
            os.truncate(path, 0)


def _make_pool() -> ProcessPoolExecutor:
    """Return a pool of one process."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(1, context, initializer=_exit_with_parent)


def _exit_with_parent() -> None:
    """Let this worker exit when its parent dies.

    Pool workers hold both ends of their queue, so they would otherwise never notice that the parent was killed.
    """

    def wait_for_end() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "only pool workers call it"
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


class RayExecutor(LocalExecutor):
    """Runs ranks as tasks of one CPU each on the Ray cluster that the caller initialised.

    All nodes see the same folders. Ray keeps the processes between tasks, so they import the heavy libraries once.
    """

    def run(self) -> Iterator[tuple[int, str]]:
        """Run all ranks that are not completed; yield (rank, error) of each one that failed, when it has failed.

        Ray repeats a rank whose process or node died.
        """
        import ray

        task = ray.remote(num_cpus=1, max_retries=MAX_TRIES - 1)(_try_rank)
        shared = ray.put(self)
        waiting = self.list_waiting()
        running: dict[ray.ObjectRef, int] = {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                rank = waiting.pop(0)
                running[task.remote(shared, rank)] = rank
            for done in ray.wait(list(running))[0]:
                rank = running.pop(done)
                try:
                    error = ray.get(done)
                except ray.exceptions.RayError as failure:  # the process or its node died, or could not be started
                    error = f"{type(failure).__name__}: {failure}"
                if error:
                    yield rank, error


def _try_rank(executor: RayExecutor, rank: int) -> str | None:
    return executor.try_rank(rank)


class SlurmExecutor(LocalExecutor):
    """Runs ranks as a job array, one CPU a task; all nodes see the same folders, and Python at the same path.

    sbatch reads partition, account and time limit from SBATCH_PARTITION, SBATCH_ACCOUNT and SBATCH_TIMELIMIT.
    """

    def run(self) -> Iterator[tuple[int, str]]:
        """Submit all ranks that are not completed and wait; yield (rank, error) of each one that failed.

        Raises:
            RefusedInput: sbatch cannot write to the folder of the logs.
            RuntimeError: Slurm does not take the job.
        """
        folder = Path(self.logging_dir.path) / "slurm"
        if "\\" in str(folder):
            raise RefusedInput(f"{folder}: sbatch drops a backslash from the path of its output; name another folder")
        shutil.rmtree(folder / "errors", ignore_errors=True)
        (folder / "errors").mkdir(parents=True)
        incomplete = self.list_waiting()
        for first in range(0, len(incomplete), MAX_ARRAY_SIZE):
            ranks = incomplete[first : first + MAX_ARRAY_SIZE]
            job = folder / f"array_{first:06d}.pickle"
            job.write_bytes(pickle.dumps((self, ranks)))
            array = self._submit_and_wait(folder, job, len(ranks))
            for rank in set(ranks) & set(compat.list_incomplete_ranks(self)):
                error = folder / "errors" / f"{rank:05d}"
                out = folder / f"{array}_{ranks.index(rank)}.out"
                # A task that was killed, or that was out of time, could write no error.
                yield rank, error.read_text() if error.exists() else f"it ended without an error of its own; see {out}"

    def _submit_and_wait(self, folder: Path, job: Path, tasks: int) -> str:
        """Run a job array to its end, and return its number."""
        # sbatch replaces patterns in the whole path of its output; `%%` stands for one percent sign.
        output = str(folder).replace("%", "%%")
        command = [
            "sbatch", "--wait", "--parsable", f"--array=0-{tasks - 1}%{self.workers}", "--ntasks=1",
            "--cpus-per-task=1", f"--output={output}/%A_%a.out", "--job-name=mobilemoe-data",
            f"--wrap={shlex.join([sys.executable, '-m', 'data.execution', str(job)])}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        array = done.stdout.strip().partition(";")[0]
        if not array:
            raise RuntimeError(f"sbatch ended with {done.returncode}: {done.stderr.strip()}")
        return array


def _run_array_task(job: str) -> None:
    """Run the rank of this task of a Slurm job array, and leave its error, if any, where the caller looks for it."""
    executor, ranks = pickle.loads(Path(job).read_bytes())
    rank = ranks[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    if error := executor.try_rank(rank):
        (Path(job).parent / "errors" / f"{rank:05d}").write_text(error, errors="backslashreplace")
        sys.exit(error)


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

    def run(
        self,
        name: str,
        blocks: list[PipelineStep],
        labels: Sequence[str],
        sizes: Sequence[float] = (),
        consumed: Path | None = None,
    ) -> None:
        """Run the blocks as one task for each label, leaving out those that are completed.

        A task that fails is logged at once, and the others go on.

        Args:
            labels: what each task works on, for messages.
            sizes: work of each task, so that the largest begin first.
            consumed: folder of the tasks' input files, each emptied when its task is completed.

        Raises:
            RuntimeError: tasks failed. The message names each with its label, its error and its log.
        """
        folder, tasks = self.logs / name, len(labels)
        if not tasks:
            self.progress(name, 0, 0)
            return
        executor = EXECUTORS[self.kind](blocks, tasks, self.workers, folder)
        executor.sizes, executor.consumed = sizes, consumed
        finished = threading.Event()
        watcher = threading.Thread(target=self._report_progress, args=(name, folder, tasks, finished), daemon=True)
        watcher.start()
        failures: dict[int, str] = {}
        try:
            for rank, error in executor.run():
                failures[rank] = f"rank {rank} ({labels[rank]}): {error}"
                log.warning("data step %r: %s", name, failures[rank])
        except Exception as failure:
            raise RuntimeError(f"data step {name!r}: {failure!r}; run again: what is completed is kept") from failure
        finally:
            finished.set()
            watcher.join()
        incomplete = compat.list_incomplete_ranks(executor)
        if incomplete:
            raise RuntimeError(_describe_failures(name, folder, incomplete, failures, tasks))
        for rank in range(tasks):
            executor.empty_input(rank)  # a task may have been killed behind its completion marker
        self.progress(name, tasks, tasks)

    def _report_progress(self, name: str, folder: Path, tasks: int, finished: threading.Event) -> None:
        while not finished.wait(POLL_SECONDS):
            self.progress(name, compat.count_completed_ranks(folder), tasks)


def _describe_failures(name: str, folder: Path, incomplete: list[int], failures: dict[int, str], tasks: int) -> str:
    """Return the message on a step with failed ranks: the first MAX_SHOWN_FAILURES in full, the others by number."""
    shown = [
        f"{failures.get(rank, f'rank {rank}: no completion marker')}; log: {folder / 'logs' / f'task_{rank:05d}.log'}"
        for rank in incomplete[:MAX_SHOWN_FAILURES]
    ]
    if len(incomplete) > len(shown):
        shown.append(f"and {len(incomplete) - len(shown)} more, each with a log in the same folder")
    return "\n".join(
        [
            f"data step {name!r}: ranks {incomplete} of {tasks} did not complete. Correct the cause, then run again: "
            "the other ranks are kept",
            *shown,
        ]
    )


if __name__ == "__main__":
    # The pickled executor's class is that of the module data.execution. Run as __main__, this file holds a second copy.
    from data import execution

    execution._run_array_task(sys.argv[1])
