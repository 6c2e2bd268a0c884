"""The job script and the one-machine Slurm: real jobs on a real Slurm with a real Ray cluster.

Tests marked `slurm` need the Debian packages slurm-wlm and munge, and root.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "slurm" / "mobilemoe.sbatch"
UP, DOWN = ROOT / "slurm" / "one_machine" / "up.sh", ROOT / "slurm" / "one_machine" / "down.sh"
SUBMIT = ROOT / "slurm" / "submit.sh"
SCRIPTS = [SBATCH, SUBMIT, UP, DOWN]
DEADLINE_SECONDS = 300  # a machine under load starts Ray slowly

needs_slurm = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(shutil.which(program) for program in ("slurmctld", "slurmd", "munged")),
        reason="Slurm is not installed: apt-get install slurm-wlm munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="the one-machine Slurm needs root"),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(script: Path) -> None:
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_end_only_what_they_started(script: Path) -> None:
    """Nodes are shared: killing by name would take down other people's Ray and Slurm."""
    code = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in code if re.search(r"\b(pkill|killall)\b|\bray stop\b", line)]


def test_outside_of_slurm_the_script_says_how_it_is_started() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run(["bash", SBATCH, "run", "smoke"], env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "SLURM_JOB_ID" in result.stderr and "submit this script with sbatch" in result.stderr


def test_gpus_counted_over_the_whole_job_are_refused() -> None:
    environment = os.environ | {"SLURM_JOB_ID": "1", "SLURM_GPUS": "4"}
    result = subprocess.run(["bash", SBATCH, "run", "smoke"], env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "--gpus=4" in result.stderr and "--gpus-per-node" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: submit.sh"),
        (["--data", "--nodes=1", "--", "l"], "--finish is missing"),
        (["--finish", "--nodes=1"], "usage: submit.sh"),
        (["--finish", "--", "l"], "--finish: give sbatch's options"),
        (["--evaluate", "--nodes=1", "--", "l"], "--evaluate is no part of a run"),
        (["--finish", "--nodes=1", "--", "l", "--until", "qat"], "--until: each job has its own"),
    ],
)
def test_a_chain_with_wrong_options_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    submitted = tmp_path / "submitted"
    (tmp_path / "sbatch").write_text('#!/bin/bash\ntouch "${0%/*}/submitted"\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([SUBMIT, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr
    assert not submitted.exists()


def test_missing_packages_are_named(tmp_path: Path) -> None:
    result = subprocess.run(
        ["/bin/bash", UP, tmp_path / "slurm"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "slurmctld slurmd sbatch munged" in result.stderr and "apt-get install slurm-wlm munge" in result.stderr
    assert not (tmp_path / "slurm").exists()


def find_processes(job: str) -> list[str]:
    """Command lines of every process on this machine that a Slurm job started: they inherit its id."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_JOB_ID={job}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended while we looked
    return found


class Slurm:
    """A one-machine Slurm of two nodes; jobs run in a folder of their own."""

    def __init__(self, state: Path, work: Path):
        self.work = work
        self.environment = os.environ | {
            "SLURM_CONF": str(state / "slurm.conf"),
            "MOBILEMOE": f"python {Path(__file__).with_name('cluster_report.py')}",
            "MOBILEMOE_NODE_IP_BASE": "127.0.0.",
            "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        }

    def command(self, *words: object) -> str:
        return subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=self.work,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def submit(self, *words: object, nodes: int, options: tuple[str, ...] = ()) -> str:
        """Submit the job script with `words` as its arguments; the job's id."""
        return self.command(
            "sbatch", "--parsable", f"--nodes={nodes}", "--cpus-per-task=1", "--output=%j.log", *options, SBATCH, *words
        )

    def field(self, job: str, name: str) -> str:
        return re.search(rf"\b{name}=(\S+)", self.command("scontrol", "show", "job", job)).group(1)

    def wait_until(self, job: str, condition: Callable[[], bool]) -> None:
        """Wait for something that the job brings about before it ends."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            ended = self.field(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
            assert not ended and time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)

    def finish(self, job: str) -> int:
        """Wait until the job has left its nodes; its exit code."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while job in self.command("squeue", "--noheader", "--format=%i").split():
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.2)
        return int(self.field(job, "ExitCode").split(":")[0])

    def log(self, job: str) -> str:
        return (self.work / f"{job}.log").read_text()

    def assert_nothing_left(self, job: str) -> None:
        assert find_processes(job) == []
        assert list(Path("/tmp").glob(f"mobilemoe-slurm-{job}-*")) == []
        assert list(self.work.glob(".mobilemoe-*")) == []


@pytest.fixture(scope="module")
def slurm():
    # Not below pytest's folder: sockets have short paths, and pytest's is closed to munge.
    state = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        for _ in range(2):  # the second one finds everything up
            subprocess.run([UP, state, "2"], check=True, timeout=60)
        # Slurm itself expands a % in the path of a job's log, the folder of submission included (docs/slurm.md).
        work = state / "jobs [v1] #1 $m 'q'"
        work.mkdir()
        yield Slurm(state, work)
    finally:
        subprocess.run([DOWN, state], check=True, timeout=60)
        shutil.rmtree(state)


class TestJobs:
    pytestmark = needs_slurm

    def test_ray_spans_two_nodes_and_the_exit_code_comes_back(self, slurm: Slurm) -> None:
        job = slurm.submit("report", 3, "--out", "runs/x", nodes=2, options=("--gpus-per-node=2",))
        assert slurm.finish(job) == 3, slurm.log(job)
        log = slurm.log(job)
        report = json.loads(re.search(r"^REPORT (.*)$", log, re.MULTILINE).group(1))
        port = int(report["address"].split(":")[1])
        assert report == {
            "nodes": 2, "cpus": 2.0, "gpus": 4.0, "ran_on": ["127.0.0.2", "127.0.0.3"],
            "address": f"127.0.0.2:{port}", "dashboard_without_token": 401, "dashboard_with_token": 200,
        }  # fmt: skip
        assert f"Ray dashboard: http://127.0.0.2:{port + 1}" in log
        assert f"ssh -L 8265:127.0.0.2:{port + 1} " in log
        command = re.search(r"TensorBoard: (.*)", log).group(1)
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
        assert words.splitlines() == ["tensorboard", "--logdir", str(slurm.work / "runs" / "x")]
        assert slurm.field(job, "Restarts") == "0"
        slurm.assert_nothing_left(job)

    def test_before_the_time_limit_the_run_stops_and_the_job_resumes_it(self, slurm: Slurm) -> None:
        progress = slurm.work / "progress"
        job = slurm.submit("train", progress, 6, nodes=1)
        # One that refuses its input after the same signal shares the time of the first.
        refused = slurm.submit("refuse_when_stopped", slurm.work / "refusing", nodes=1)
        for started, who in ((progress, job), (slurm.work / "refusing", refused)):
            slurm.wait_until(who, started.exists)
            # What --signal=B:USR1@120 sends.
            slurm.command("scancel", "--batch", "--signal=USR1", who)
        assert slurm.finish(refused) == 2
        assert slurm.field(refused, "Restarts") == "0"
        assert slurm.finish(job) == 0
        assert slurm.field(job, "Restarts") == "1"
        resumed = [int(done) for done in re.findall(r"^RESUMED (\d+)$", slurm.log(job), re.MULTILINE)]
        assert len(resumed) == 2 and resumed[0] == 0 and 1 <= resumed[1] < 6
        assert "ended with exit code 130" in slurm.log(job)
        assert progress.read_text() == "6"
        slurm.assert_nothing_left(job)
        slurm.assert_nothing_left(refused)

    def test_a_cancelled_job_and_a_killed_script_leave_nothing(self, slurm: Slurm) -> None:
        jobs = [slurm.submit("train", slurm.work / name, 1000, nodes=1) for name in ("cancelled", "killed")]
        for job, name in zip(jobs, ("cancelled", "killed"), strict=True):
            slurm.wait_until(job, (slurm.work / name).exists)
        slurm.command("scancel", jobs[0])
        script = re.compile(rf"\bjob0*{jobs[1]}/slurm_script\b")
        pids = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if script.search(path.read_text().replace("\0", " "))
        ]
        os.kill(min(pids), 9)
        for job in jobs:
            slurm.finish(job)
            slurm.assert_nothing_left(job)
        assert [slurm.field(job, "JobState") for job in jobs] == ["CANCELLED", "FAILED"]

    def submit_chain(self, slurm: Slurm, folder: Path) -> dict[str, str]:
        """Submit a run as three jobs of other sizes; part -> job."""
        folder.mkdir()
        printed = slurm.command(
            SUBMIT, "--data", "--nodes=1 --cpus-per-task=1 --output=%j.log",
            "--train", "--nodes=2 --cpus-per-task=1 --gpus-per-node=2 --output=%j.log",
            "--finish", "--nodes=1 --cpus-per-task=1 --gpus-per-node=1 --output=%j.log",
            "--", folder, "--out", "runs/a b",
        )  # fmt: skip
        return dict(re.findall(r"^(\w+): job (\d+)$", printed, re.MULTILINE))

    def test_a_chain_of_jobs_each_of_its_size(self, slurm: Slurm) -> None:
        """The middle one is stopped before its time limit and requeued; the last one waits for its second attempt."""
        folder = slurm.work / "chain"
        chain = self.submit_chain(slurm, folder)
        (folder / "qat.code").write_text("75")
        assert list(chain) == ["data", "train", "finish"]
        jobs = folder / "jobs.jsonl"
        slurm.wait_until(chain["train"], lambda: jobs.exists() and len(jobs.read_text().splitlines()) == 2)
        assert slurm.field(chain["finish"], "JobState") == "PENDING"
        slurm.command("scancel", "--batch", "--signal=USR1", chain["train"])
        assert [slurm.finish(chain[part]) for part in ("data", "train", "finish")] == [0, 0, 0], slurm.log(
            chain["train"]
        )
        assert slurm.field(chain["train"], "Restarts") == "1"
        out = ["--out", "runs/a b"]
        training = {"options": [*out, "--until", "qat"], "nodes": 2, "gpus": 4.0}
        assert [json.loads(line) for line in jobs.read_text().splitlines()] == [
            {"options": [*out, "--until", "data"], "nodes": 1, "gpus": 0},
            training,
            training,
            {"options": out, "nodes": 1, "gpus": 1.0},
        ]
        for job in chain.values():
            slurm.assert_nothing_left(job)

    def test_a_job_that_fails_stops_the_chain(self, slurm: Slurm) -> None:
        folder = slurm.work / "failing"
        chain = self.submit_chain(slurm, folder)
        (folder / "data.code").write_text("1")
        assert slurm.finish(chain["data"]) == 1, slurm.log(chain["data"])
        for part in ("train", "finish"):
            slurm.finish(chain[part])
            assert slurm.field(chain[part], "JobState") == "CANCELLED"
        assert len((folder / "jobs.jsonl").read_text().splitlines()) == 1

    def test_a_chain_is_submitted_whole_or_not_at_all(self, slurm: Slurm) -> None:
        command = [SUBMIT, "--data", "--nodes=1 --hold", "--finish", "--partition=absent", "--", "smoke"]
        result = subprocess.run(command, env=slurm.environment, cwd=slurm.work, capture_output=True, text=True)
        assert result.returncode != 0 and "was cancelled" in result.stderr
        job = re.search(r"data: job (\d+)", result.stdout).group(1)
        assert slurm.field(job, "JobState") == "CANCELLED"
