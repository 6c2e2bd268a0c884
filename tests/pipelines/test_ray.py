"""Ray for real: two workers on gloo, one killed, one that raises; tasks; leftovers of a killed driver."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from core.cache import SHARED_TEMPORARY, find_shared_temporary
from pipelines.ray import orphan_reaper
from pipelines.ray.cluster import Cluster, Task, WorkerFailed
from pipelines.ray.orphan_reaper import MARKER_VARIABLE, end_processes, find_processes, make_marker
from pipelines.ray.temporary_folder import (
    PREFIX,
    enter_temporary_folder,
    leave_temporary_folder,
    make_temporary_folder,
)
from pipelines.recipe import ClusterConfig
from tests.pipelines import gang_functions as gang

LITTERED: list[Path] = []
"""Folders for temporary files that must be gone with the cluster."""
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
"""Ray's workers import this package from here."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # somebody else's Ray is not joined
        with Cluster(ClusterConfig(max_failures=1, cpus_per_task=1), run, world_size=2) as cluster:
            yield cluster
    assert find_processes(run) == []
    assert not any(folder.exists() for folder in LITTERED)


def test_gang_gets_its_environment_and_survives_a_sigkill(cluster, tmp_path):
    """Rank 1 is killed on the first attempt; on the second both sum over gloo, set up from the environment alone."""
    cluster.run_gang(gang.killed_once, tmp_path, name="killed")
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == (
            f"sum=3 RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 OMP_NUM_THREADS=1 "
            f"GLOO_SOCKET_IFNAME=lo tcmalloc={find_library('tcmalloc_minimal') is not None}"
        )
        assert "reduced 3.0" in (cluster.run / f"logs/killed.rank{rank}.log").read_text()
    assert "rank 1: " in (cluster.run / "logs/killed.failures.log").read_text()


def test_exception_surfaces_with_rank_and_traceback(cluster, tmp_path):
    without_restart = Cluster(ClusterConfig(max_failures=0), cluster.run, world_size=2)
    with pytest.raises(WorkerFailed) as failure:
        without_restart.run_gang(gang.raises, tmp_path, name="raises")
    assert "rank 1: " in str(failure.value)
    for text in (str(failure.value), (cluster.run / "logs/raises.failures.log").read_text()):
        assert 'raise KeyError("a fault of rank one")' in text


def test_tasks_return_in_order_and_log(cluster, tmp_path):
    tasks = [Task(gang.task, (text, False), tmp_path / f"{text}.log", num_cpus=1) for text in ("a", "b", "c")]
    assert cluster.run_tasks(tasks) == ["A", "B", "C"]
    assert (tmp_path / "b.log").read_text() == "task says b\n"


def test_task_failure_keeps_the_traceback(cluster, tmp_path):
    with pytest.raises(WorkerFailed, match="tea is not wanted") as failure:
        cluster.run_tasks([Task(gang.task, ("tea", True), tmp_path / "log", num_cpus=1)])
    assert "gang_functions.py" in str(failure.value)


def test_what_workers_leave_among_the_temporary_files_goes_with_the_run(cluster, tmp_path):
    ((own, shared),) = cluster.run_tasks([Task(gang.leave_litter, (), tmp_path / "log", num_cpus=1)])
    assert Path(own).parent == Path(shared) and Path(own).name.startswith(PREFIX)
    assert Path(own).stat().st_mode & 0o77 == 0, "nobody else reads it"
    LITTERED.append(Path(own))


def test_folders_of_drivers_that_are_gone_are_removed_by_the_next_one(tmp_path, monkeypatch):
    """Those of living drivers, of other hosts and users, and links stay."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv(SHARED_TEMPORARY, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"{PREFIX}{pid}-abc" for pid in (ended.pid, os.getpid())] + [f"{PREFIX}abc", "mobilemoe-shards-0"]
    names.append(f"mobilemoe-run-01234567-{ended.pid}-abc")
    for name in names:
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / f"{PREFIX}{ended.pid}-link").symlink_to(tmp_path / "mobilemoe-shards-0")
    own = make_temporary_folder()
    enter_temporary_folder(own)
    assert tempfile.gettempdir() == str(own) and find_shared_temporary() == str(tmp_path)
    for _ in ("once", "again, after an interrupt"):
        leave_temporary_folder()
        assert tempfile.gettempdir() == find_shared_temporary() == str(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {own.name, *names[1:], f"{PREFIX}{ended.pid}-link"}
    assert (tmp_path / "mobilemoe-shards-0/sub").is_dir()


def test_a_ray_that_does_not_start_leaves_nothing(tmp_path, monkeypatch):
    """This process uses the user's folder for temporary files again, and the run's folders are gone."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.delenv(SHARED_TEMPORARY, raising=False)
    monkeypatch.delenv(MARKER_VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("pipelines.ray.cluster.ray.shutdown", lambda: None)  # the other tests' Ray goes on
    made = []

    def fail(folder: str, **_: object) -> None:
        made.extend([Path(folder), Path(tempfile.gettempdir())])
        raise RuntimeError("no Ray today")

    monkeypatch.setattr("pipelines.ray.cluster.start_local_ray", fail)
    with pytest.raises(RuntimeError, match="no Ray today"), Cluster(ClusterConfig(), tmp_path / "run", world_size=1):
        pass
    assert made[1].name.startswith(PREFIX) and not any(folder.exists() for folder in made)
    assert tempfile.gettempdir() == str(shared)
    assert SHARED_TEMPORARY not in os.environ and MARKER_VARIABLE not in os.environ


@pytest.fixture
def beside_the_other(tmp_path, monkeypatch):
    """Let a test start a cluster of its own in this process: what is of the other tests' one comes back afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for variable in (SHARED_TEMPORARY, MARKER_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pipelines.ray.cluster.ray.shutdown", lambda: None)


@pytest.mark.usefixtures("beside_the_other")
@pytest.mark.parametrize(("failures", "starts"), [(2, True), (3, False)])
def test_a_ray_that_fails_to_start_is_started_again(failures, starts, tmp_path, monkeypatch):
    """What the attempt before left is ended first."""
    left = []

    def start(folder: str, **_: object) -> object:
        assert all(process.poll() is not None for process in left)
        if len(left) < failures:
            left.append(subprocess.Popen(["sleep", "600"]))  # which has the run's marker
            raise Exception("The current node timed out during startup.")  # as Ray does
        return SimpleNamespace(dashboard_url="")

    monkeypatch.setattr("pipelines.ray.cluster.start_local_ray", start)
    monkeypatch.setattr(orphan_reaper, "PATIENCE_SECONDS", 0.1)
    with (
        pytest.raises(Exception, match="timed out") if not starts else nullcontext(),
        Cluster(ClusterConfig(), tmp_path / "run", world_size=1),
    ):
        assert len(left) == 2
    assert all(process.poll() is not None for process in left)


@pytest.mark.usefixtures("beside_the_other")
def test_a_ray_that_never_starts_ends_the_command(tmp_path, monkeypatch, capsys):
    """`ray.init` waits for ever where a process of Ray was killed while it started."""
    ended = threading.Event()
    monkeypatch.setattr("pipelines.ray.cluster.START_SECONDS", 0.1)
    monkeypatch.setattr("pipelines.ray.cluster.os._exit", lambda code: ended.set() if code == 1 else None)

    def start(folder: str, **_: object) -> None:
        assert ended.wait(60)
        raise ValueError("where the process would have ended")

    monkeypatch.setattr("pipelines.ray.cluster.start_local_ray", start)
    with pytest.raises(ValueError, match="would have ended"), Cluster(ClusterConfig(), tmp_path / "run", world_size=1):
        pass
    assert "the same command tries again" in capsys.readouterr().err


def test_gang_larger_than_the_cluster_is_refused(cluster):
    large = Cluster(ClusterConfig(cpus_per_worker=10_000), cluster.run, world_size=3)
    with pytest.raises(ValueError, match=r"cluster\.cpus_per_worker.*30000 CPU: the Ray cluster has"):
        large.check_size()
    large.check_size(trains=False, evaluates=True)  # a run goes on with its export on a smaller cluster


def test_a_task_that_no_node_holds_is_refused(cluster):
    """Ray would wait for such a node for ever."""
    wide = Cluster(ClusterConfig(cpus_per_task=10_000), cluster.run, world_size=1)
    with pytest.raises(ValueError, match=r"cpus_per_task = 10000 and 0 GPU: no node .* has \d+ CPU and 0 GPU"):
        wide.check_size(trains=False)
    on_gpus = Cluster(ClusterConfig(cpus_per_task=1, gpus_per_worker=1), cluster.run, world_size=1)
    on_gpus.check_size(trains=False)
    with pytest.raises(ValueError, match=r"1 GPU: no node .*--cluster\.gpus-per-worker 0"):
        on_gpus.check_size(trains=False, evaluates=True)


def test_process_that_stays_is_ended_and_others_are_not(tmp_path):
    def sleeper(run):
        return subprocess.Popen(["sleep", "600"], env=os.environ | {MARKER_VARIABLE: make_marker(run)})

    others = [sleeper(run) for run in (tmp_path / "r" / "other", tmp_path / "r#1", tmp_path / "r1", f"/x#{tmp_path}/r")]
    ours = sleeper(tmp_path / "r")
    end_processes(tmp_path / "r", driver="1.1")
    assert ours.poll() is None
    end_processes(tmp_path / "r")
    assert not psutil.pid_exists(ours.pid)
    for other in others:
        assert other.poll() is None
        other.kill()
        other.wait()


def test_a_process_that_starts_others_is_ended_with_all_of_them(tmp_path, monkeypatch):
    """Also those that it starts while the others are killed."""
    monkeypatch.setattr(orphan_reaper, "PATIENCE_SECONDS", 0.3)
    program = "import subprocess, time\nwhile True: subprocess.Popen(['sleep', '600']); time.sleep(0.005)"
    environment = os.environ | {MARKER_VARIABLE: make_marker(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    while len(find_processes(tmp_path)) < 20:
        time.sleep(0.05)
    end_processes(tmp_path)
    assert find_processes(tmp_path) == []
    parent.wait()


def test_sigkill_of_the_driver_leaves_nothing(tmp_path):
    """No process, and no folder for temporary files."""
    driver = subprocess.Popen(
        [sys.executable, HERE / "killable_driver.py", tmp_path], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert driver.stdout.readline() == "training\n"
    assert len(find_processes(tmp_path)) > 5
    driver.kill()
    deadline = time.monotonic() + 20
    while find_processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert find_processes(tmp_path) == []
    while (own := list(Path(find_shared_temporary()).glob(f"{PREFIX}{driver.pid}-*"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert own == []
