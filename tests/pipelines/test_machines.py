"""The cluster starts, and workers import our code, on machines of every kind: homes, users, folders, other files."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from core.environment import find_socket_folder
from pipelines.ray.access import RAY_FOLDER
from pipelines.ray.cluster import FOLDER_PREFIX, LONGEST_FOLDER

ROOT = Path(__file__).parents[2]
UNKNOWN = 54321
"""Id of a user and a group that no table names."""
UNPRIVILEGED = (
    "setpriv", f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups", "--no-new-privs", "--inh-caps=-all",
    "--bounding-set=-all",
)  # fmt: skip
"""Beginning of a command that runs as this user, without any capability, where root starts it."""

DEAD_PROXY = "http://127.0.0.1:9"
MISLEADING = {
    "RAY_ADDRESS": "127.0.0.1:1", "RAY_TMPDIR": "/absent", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "many",
    "http_proxy": DEAD_PROXY, "https_proxy": DEAD_PROXY, "HTTP_PROXY": DEAD_PROXY, "grpc_proxy": DEAD_PROXY,
    "RANK": "7", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "absent", "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "SLURM_JOB_ID": "77", "SLURM_PROCID": "3", "SLURM_NTASKS": "8",
    "LANG": "C", "LC_ALL": "C", "LD_PRELOAD": "/absent/libtcmalloc.so",
}  # fmt: skip
"""Variables of another Ray, a launcher, a proxy, an allocation, a locale and an allocator that is not there."""


def start_cluster(run, cwd, within=(), **variables):
    """Return what the workers of a cluster saw that a process with these variables started; None removes a variable.

    within: beginning of a command that starts the process.
    """
    removed = ("TMPDIR", "MOBILEMOE_CACHE", "TORCHINDUCTOR_CACHE_DIR", "PYTHONSAFEPATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"PYTHONPATH": str(ROOT)} | {name: value for name, value in variables.items() if value is not None}
    for name in (name for name, value in variables.items() if value is None):
        environment.pop(name, None)
    command = [*within, sys.executable, "-P", "-m", "tests.pipelines.machine_driver", str(run)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_workers(seen, cwd):
    for worker in (seen["task"], seen["gang"]):
        assert [worker[room] for room in ("core", "data", "eval")] == [str(ROOT)] * 3
        assert worker["cwd"] == str(cwd), "relative paths of a recipe mean the same on workers"
        assert "compiled-" in worker["inductor"]
    assert (seen["task"]["rank"], seen["gang"]["rank"]) == ("None of None", "0 of 1")
    assert seen["task"]["meets_at"] == "None None", "the launcher's store is not joined"
    assert seen["gang"]["meets_at"] == "127.0.0.1 True", "the gang's own is"


def test_files_named_as_our_rooms_and_a_long_folder_for_temporary_files_and_a_home_that_cannot_be_written(tmp_path):
    cwd, long = tmp_path / "x [v1] #1", tmp_path / ("t" * 90)
    for folder in (cwd, long, tmp_path / "run"):
        folder.mkdir()
    for name in ("core", "data", "eval", "pipelines", "titan_ext", "random", "ray"):
        (cwd / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    seen = start_cluster(tmp_path / "run", cwd, HOME="/proc/nobody", TMPDIR=str(long), **MISLEADING)
    check_workers(seen, cwd)
    home = Path(seen["task"]["home"])
    assert home.resolve() == long.resolve() / f"mobilemoe-cache-{os.getuid()}" / "home"
    link = home.parents[1]
    assert link.is_symlink() and len(str(link)) < 50
    link.unlink()


def become_unknown(*folders):
    """Return the beginning of a command that runs as UNKNOWN, which may enter these folders, where root starts it.

    Folders above them, such as /root, may be closed to others. Their modes stay as they are. In its own mount namespace
    the command has an empty folder in place of a closed one, with nothing but the given folders in it.
    """
    closed, opened, mounts, shut = {}, ["set -e"], [], []
    for number, folder in enumerate(sorted(set(folders)), start=3):
        opened.append(f"exec {number}<{shlex.quote(str(folder))}")
        shut.append(f"exec {number}<&-")
        outermost = [parent for parent in folder.parents if not parent.stat().st_mode & stat.S_IXOTH][-1:]
        if outermost:
            closed.setdefault(outermost[0], []).append((number, shlex.quote(str(folder))))
    for parent, inside in closed.items():
        mounts.append(f"mount -t tmpfs -o mode=755 none {shlex.quote(str(parent))}")
        for number, quoted in inside:
            mounts.append(f"mkdir -p {quoted}; mount --no-canonicalize --rbind /proc/self/fd/{number} {quoted}")
    script = "\n".join([*opened, *mounts, *shut, 'exec "$@"'])
    return ["unshare", "--mount", "sh", "-c", script, "sh", *UNPRIVILEGED]


def test_a_user_whom_the_system_does_not_know(tmp_path):
    """The user of a container with --user 54321: no entry in the table of passwords, no HOME and no right of root."""
    if os.getuid() or not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("only root can start a process of another user, with unshare and setpriv")
    (tmp_path / "run").mkdir()
    for folder in (tmp_path, tmp_path / "run"):
        os.chown(folder, UNKNOWN, UNKNOWN)
    within = become_unknown(*(Path(folder).resolve() for folder in (sys.base_prefix, sys.prefix, ROOT, tmp_path)))
    code = "import os, pwd; print(open('/proc/self/status').read()); pwd.getpwuid(os.getuid())"
    done = subprocess.run([*within, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if f"uid not found: {UNKNOWN}" not in done.stderr:
        pytest.skip(f"no process of an unknown user can run here: {done.stderr.strip()[-300:]}")
    assert "CapEff:\t0000000000000000\n" in done.stdout
    seen = start_cluster(
        tmp_path / "run", tmp_path, within, TMPDIR=str(tmp_path), HOME=None, USER=None, LOGNAME=None,
        USERNAME=None, LNAME=None,
    )  # fmt: skip
    check_workers(seen, tmp_path)
    for worker in (seen["task"], seen["gang"]):
        assert worker["user"] == f"{UNKNOWN}:{UNKNOWN} uid{UNKNOWN}"
    home = Path(seen["task"]["home"])
    assert home.resolve() == (tmp_path / f"mobilemoe-cache-{UNKNOWN}" / "home").resolve()
    assert home.stat().st_uid == UNKNOWN
    if home.parents[1].is_symlink():
        home.parents[1].unlink()


def test_the_socket_folder_is_short_enough(monkeypatch, tmp_path):
    longest = LONGEST_FOLDER - len(f"/{FOLDER_PREFIX}12345678")
    session = f"{RAY_FOLDER}/session_2026-01-31_23-59-59_999999_4194304"
    assert len(f"{'x' * longest}/{FOLDER_PREFIX}12345678/{session}/sockets/plasma_store") == 107
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert find_socket_folder(longest) == Path("/tmp")
    monkeypatch.setattr("core.environment.SOCKET_FOLDERS", ())
    assert find_socket_folder(longest) is None


@pytest.mark.parametrize("start", [["-m", "pipelines.cli"], ["-c", "from pipelines.cli import main; exit(main())"]])
def test_our_own_packages_are_imported_where_the_working_directory_comes_first(tmp_path, start):
    for name in ("core", "data", "eval", "titan_ext", "random"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, *start, "info", "S", "--json"], cwd=tmp_path, env=environment | {"PYTHONPATH": f":{ROOT}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dimensions"]["d_model"] == 768


def test_a_removed_working_directory_is_refused(tmp_path):
    (tmp_path / "gone").mkdir()
    code = "import os; os.rmdir(os.getcwd()); from pipelines.cli import main; raise SystemExit(main(['recipes']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path / "gone", env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "the working directory was removed" in done.stderr
