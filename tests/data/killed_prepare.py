"""Prepare one folder in processes that are ended one after the other, and print the state each one left (JSON).

    python -m tests.data.killed_prepare SOURCE BENCHMARK_TEXTS OUT

The first process may write no file of more than 4 kB, which has the effect of a full disk. The others are killed by
SIGKILL when a phase is reported done, as in a crash of the node. The processes and their workers are forked from this
one, so that the libraries are imported once and not seven times.
"""

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

from data import execution
from data.catalogue import corpora
from data.pipeline import prepare
from data.tokens import shard_writer  # noqa: F401 imports what the workers need
from tests.data import planted

FORK = multiprocessing.get_context("fork")
ENDS = (("never", 4096), ("4-near-signatures", None), ("10-join", None))
"""Phase after which the process dies, and the limit to its files in bytes."""


def end_badly(benchmark_texts: Path, out: Path, last_phase: str, max_file_bytes: int | None) -> None:
    execution.multiprocessing.get_context = lambda _: FORK
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    def progress(phase: str, done: int, total: int) -> None:
        if phase == last_phase and done >= 1:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(planted.CONFIG, packages={}, benchmark_texts=benchmark_texts, out=out, progress=progress)


def main(source: Path, benchmark_texts: Path, out: Path) -> None:
    corpora.CATALOGUE.update(planted.planted_corpora(source))
    marker = out / "work/logs/1-read-and-filter/completions/00000"
    left = []
    for end in ENDS:
        process = FORK.Process(target=end_badly, args=(benchmark_texts, out, *end))
        process.start()
        process.join()
        # The workers are forked here, and share the lock of the folder until they notice that their parent is gone.
        if (out / ".lock").exists():
            with (out / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
        left.append(
            {
                "exitcode": process.exitcode,
                "finished": (out / "data_manifest.json").exists(),
                "first_step_done_at": marker.stat().st_mtime_ns if marker.exists() else None,
            }
        )
    print(json.dumps(left))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
