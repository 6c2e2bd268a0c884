"""Starts the ranks of a stage on this machine: one process per rank, with gloo over the loopback interface.

Ranks are forked from a server that has imported torchtitan once, which saves each of them ten seconds. Runs on a
cluster are started by Ray (pipelines/ray); tests and benchmarks use this launcher.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import socket
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import run_stage

_SERVER = multiprocessing.get_context("forkserver")
_PRELOADED = "titan_ext.training.train"
_SERVER.set_forkserver_preload([_PRELOADED])
_LOG_CHARACTERS = 4000
"""Number of characters of a rank's log that an error shows, from its end."""


def start_fork_server(preload: Iterable[str] = ()) -> None:
    """Start this process's fork server, with torchtitan and the modules `preload` imported.

    A process has one fork server, and the first use of it decides what it has imported. Without this call, that use is
    `start_ranks` or a caller's own use of the fork server. Importing this module must not start it: every rank imports
    it as well.
    """
    _SERVER.set_forkserver_preload([_PRELOADED, *preload])
    multiprocessing.forkserver.ensure_running()


def start_ranks(
    spec: StageSpec,
    log_folder: Path,
    function: Callable[[StageSpec], None] = run_stage,
    ranks: Iterable[int] | None = None,
) -> list[BaseProcess]:
    """Start `function` on every rank of `spec.parallel`, or on `ranks` only; the caller joins or kills the processes.

    Rank i writes its output to `log_folder`/rank_i.log.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = spec.parallel.world_size
    processes: list[BaseProcess] = []
    for rank in ranks or range(world):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        process = _SERVER.Process(target=_run_rank, args=(function, spec, environment, log_folder / f"rank_{rank}.log"))
        process.start()
        processes.append(process)
    return processes


def run_ranks(
    spec: StageSpec,
    log_folder: Path,
    function: Callable[[StageSpec], None] = run_stage,
    timeout: float = 200,
    ranks: Iterable[int] | None = None,
) -> None:
    """Start the ranks as `start_ranks` does and wait until all have ended.

    Args:
        timeout: time in seconds after which ranks that still run are killed.

    Raises:
        RuntimeError: a rank failed or was killed; the message contains the end of every rank's log.
    """
    processes = start_ranks(spec, log_folder, function, ranks)
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            time.sleep(1)  # the other ranks may be about to log the cause
            break
        processes[0].join(0.1)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    if any(code != 0 for code in codes):
        logs = "\n".join(_read_log_end(log) for log in sorted(log_folder.glob("rank_*.log")))
        raise RuntimeError(f"ranks ended with {codes}\n{logs}")


def _run_rank(function: Callable[[StageSpec], None], spec: StageSpec, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    function(spec)


def _read_log_end(log: Path) -> str:
    """Return the last lines of a rank's log, without the list of modules that Python prints on a fatal signal."""
    text = log.read_text() if log.exists() else f"{log}: the rank had not started yet"
    lines = [line for line in text.splitlines() if not line.startswith("Extension modules:")]
    return "\n".join(lines)[-_LOG_CHARACTERS:]
