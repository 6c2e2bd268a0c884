"""datatrove blocks as a job array of a real one-machine Slurm: failures raised, finished ranks kept."""

import os
import subprocess

import pytest

from data.execution import StepRunner
from tests.data.test_execution import Touch
from tests.slurm.test_sbatch import ROOT, needs_slurm, slurm  # noqa: F401  the fixture

pytestmark = needs_slurm


def test_failed_rank_is_raised_and_run_again_through_slurm(slurm, tmp_path_factory, monkeypatch):  # noqa: F811
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path_factory.mktemp("array")
    runner = StepRunner("slurm", 2, folder / "logs", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"data step 'touch': ranks \[1\] of 3 did not complete"):
        runner.run("touch", [Touch(folder, killed=False)], 3)
    (folder / "repaired").touch()
    runner.run("touch", [Touch(folder, killed=False)], 3)
    assert [(folder / str(rank)).read_text() for rank in (0, 1, 2)] == ["ran\n", "ran\nran\n", "ran\n"]
    queued = subprocess.run(["squeue", "--noheader"], env=os.environ, capture_output=True, text=True, check=True)
    assert queued.stdout == ""
