"""Ray for real: two workers on gloo, one killed, one that raises; tasks; leftovers of a killed driver."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import nullcontext
from ctypes.util import find_library
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

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
from tests.planted_keys import PLANTED, find_planted, find_planted_in_commands, find_planted_in_files

LITTERED: list[Path] = []
"""Folders for temporary files that must be gone with the cluster."""
OTHER_USER = 65534
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
"""Ray's workers import this package from here."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # somebody else's Ray is not joined
        for name, key in PLANTED.items():
            patch.setenv(name, key)
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


@pytest.fixture(scope="class")
def processes_at_work(cluster, tmp_path_factory):
    """The processes of a cluster on which a gang of two is at work. It holds all CPUs, so it ends with the class."""
    folder = tmp_path_factory.mktemp("gang")
    gang_thread = threading.Thread(target=cluster.run_gang, args=(gang.wait_at_work, folder), kwargs={"name": "doors"})
    gang_thread.start()
    while not all((folder / f"met{rank}").exists() for rank in (0, 1)):
        assert gang_thread.is_alive()
        time.sleep(0.05)
    yield [psutil.Process(), *find_processes(cluster.run)]
    (folder / "go").touch()
    gang_thread.join()


def try_doors(cluster, processes, user):
    """Return what came of the attempts of a user; a driver's own environment stays out of theirs."""
    token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    dashboard = cluster.dashboard.partition(" ")[0]
    words = [user, token_file.parent, token_file, dashboard, ray.get_runtime_context().gcs_address]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-m", "tests.pipelines.intruder", *words, *(process.pid for process in processes)]
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


class TestDoors:
    """Who may use a run's Ray, and what it shows."""

    def test_every_server_of_a_run_listens_on_this_machine_alone(self, processes_at_work):
        addresses = [
            connection.laddr
            for process in processes_at_work
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(addresses) > 8, "GCS, raylet, dashboard, agents, driver, two ranks, their store"
        outside = [address for address in addresses if not ip_address(address.ip.removeprefix("::ffff:")).is_loopback]
        assert outside == []

    def test_keys_of_the_environment_are_in_no_command_no_log_of_ray_and_not_on_the_dashboard(
        self, cluster, processes_at_work
    ):
        token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert find_planted_in_commands(process.pid for process in processes_at_work) == []
        assert find_planted_in_files(token_file.parent) == find_planted_in_files(cluster.run) == []
        logs = [path for path in token_file.parent.rglob("*") if path.suffix in (".log", ".out", ".err")]
        assert len(logs) > 5, "Ray's logs are there"
        token, dashboard = token_file.read_text(), cluster.dashboard.partition(" ")[0]
        for kind in ("tasks", "actors", "workers", "nodes", "jobs", "runtime_envs"):
            for page in (f"api/v0/{kind}?detail=1", f"{kind}?view=summary", "api/jobs/"):
                request = urllib.request.Request(f"{dashboard}/{page}", headers={"Authorization": f"Bearer {token}"})
                try:
                    content = urllib.request.urlopen(request, timeout=60).read()
                except urllib.error.HTTPError as error:
                    assert error.code == 404, page
                    continue
                assert find_planted(content, page) == []
                assert token.encode() not in content

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
    def test_another_user_neither_reads_a_run_nor_submits_to_its_ray(self, cluster, processes_at_work):
        other = try_doors(cluster, processes_at_work, OTHER_USER)
        for name in ("folder", "token", "sockets", "environment", "object store"):
            assert other[name] and all(result.startswith("PermissionError") for result in other[name]), (
                name,
                other[name],
            )
        assert other["job"] == ["HTTP 401", "HTTP 403"]
        assert "nauthenticated" in other["cluster"][0] or "uthentication" in other["cluster"][0]
        own = try_doors(cluster, processes_at_work, os.getuid())
        for name in ("folder", "token", "sockets", "environment", "object store"):
            assert own[name] == ["done"] * len(own[name]), "what the other user tried is there"
        assert own["job"] == ["HTTP 401", "HTTP 403"], "without the token the owner is nobody either"


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
    """The processes of the attempt before are ended first."""
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
