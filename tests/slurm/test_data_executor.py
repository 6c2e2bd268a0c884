"""datatrove blocks as a job array of a real one-machine Slurm: failures raised, finished ranks kept."""

import os
import subprocess

import pytest

from data.execution import StepRunner
from tests.data.test_execution import LABELS, Touch
from tests.slurm.test_sbatch import ROOT, needs_slurm, slurm  # noqa: F401  the fixture

pytestmark = needs_slurm


def test_failed_rank_is_raised_and_run_again_through_slurm(slurm, tmp_path_factory, monkeypatch):  # noqa: F811
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # sbatch would replace %j, and a shell would see the quote and the dollar.
    folder = tmp_path_factory.mktemp("array") / "50%j [x] it's $HOME a::b\n%"
    folder.mkdir()
    runner = StepRunner("slurm", 2, folder / "logs", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"data step 'touch': ranks \[1\] of 4 did not complete") as caught:
        runner.run("touch", [Touch(folder)], LABELS)
    assert "rank 1 (corpus.00001): OSError: disk is full" in str(caught.value)
    assert len(list((folder / "logs/touch/slurm").glob("*.out"))) == 4
    (folder / "repaired").touch()
    runner.run("touch", [Touch(folder)], LABELS)
    assert [(folder / str(rank)).read_text().count("ran") for rank in range(4)] == [1, 2, 1, 1]
    queued = subprocess.run(["squeue", "--noheader"], env=os.environ, capture_output=True, text=True, check=True)
    assert queued.stdout == ""


def test_a_job_that_slurm_does_not_take_says_why(slurm, tmp_path_factory, monkeypatch):  # noqa: F811
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SBATCH_PARTITION", "no-such-partition")
    folder = tmp_path_factory.mktemp("refused")
    with pytest.raises(RuntimeError, match=r"(?s)data step 'touch': .*invalid partition.*run again"):
        StepRunner("slurm", 2, folder / "logs", lambda *_: None).run("touch", [Touch(folder)], LABELS)


def test_a_task_that_is_killed_names_slurms_own_output(slurm, tmp_path_factory, monkeypatch):  # noqa: F811
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(RuntimeError, match=r"rank 1 \(corpus.00001\): it ended without an error of its own; see .*out"):
        StepRunner("slurm", 2, folder / "logs", lambda *_: None).run("touch", [Touch(folder, killed=True)], LABELS)


def test_a_folder_that_sbatch_cannot_write_to_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"RefusedInput.*sbatch drops a backslash.*name another folder"):
        StepRunner("slurm", 2, tmp_path / "a\\b", lambda *_: None).run("touch", [Touch(tmp_path)], LABELS)
