"""Failures are raised and name their ranks; what was done stays done."""

import os
import signal
from pathlib import Path

import pytest
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data.execution import StepRunner


class Touch(PipelineStep):
    """Appends a line to a file of its rank; one rank fails until a file says otherwise."""

    def __init__(self, folder: Path, killed: bool):
        super().__init__()
        self.folder = str(folder)
        self.killed = killed

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with (Path(self.folder) / str(rank)).open("a") as file:
            file.write("ran\n")
        if rank == 1 and not (Path(self.folder) / "repaired").exists():
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("disk is full")


def check_failure_and_resume(kind: str, folder: Path, killed: bool = False) -> None:
    reports = []
    runner = StepRunner(kind, 2, folder / "logs", lambda *args: reports.append(args))
    with pytest.raises(RuntimeError, match=r"data step 'touch': ranks \[.*1.*\] of 3 did not complete"):
        runner.run("touch", [Touch(folder, killed)], 3)
    done = {int(marker.name) for marker in folder.glob("logs/touch/completions/*")}  # perhaps none: a pool dies whole
    assert 1 not in done
    (folder / "repaired").touch()
    runner.run("touch", [Touch(folder, killed)], 3)
    for rank in done:
        assert (folder / str(rank)).read_text() == "ran\n"
    assert reports[-1] == ("touch", 3, 3)


def test_failed_rank_is_raised_and_run_again_locally(tmp_path):
    check_failure_and_resume("local", tmp_path)


def test_worker_killed_by_the_system_is_raised_and_run_again(tmp_path):
    check_failure_and_resume("local", tmp_path, killed=True)


def test_failed_rank_is_raised_and_run_again_on_ray(tmp_path):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        check_failure_and_resume("ray", tmp_path)
    finally:
        ray.shutdown()
