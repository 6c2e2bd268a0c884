"""The environment of this process and its children: homes, users, temporary folders, module paths, launchers."""

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from core.environment import LINK_PREFIX, _shorten

ROOT = Path(__file__).parents[2]
NOBODY = 54321
PREPARE = """
import json, os, sys
from core.environment import prepare_environment
prepare_environment()
once = dict(os.environ)
prepare_environment()
assert once == dict(os.environ), "a second call changed something"
print(json.dumps(once))
"""
LAUNCHED = {
    "RANK": "7", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "nowhere",
    "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_FSDP": "true",
}  # fmt: skip


def run_prepare(cwd, **variables):
    """Prepare the environment in a process with these variables (None removes one)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(cwd), "MOBILEMOE_CACHE": None} | variables
    return subprocess.run(
        [sys.executable, "-P", "-c", PREPARE], cwd=cwd, capture_output=True, text=True, check=False,
        env={name: value for name, value in environment.items() if value is not None},
    )  # fmt: skip


def prepare(cwd, **variables):
    """Return the variables that `run_prepare` ended with."""
    done = run_prepare(cwd, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("home", ["/proc/nobody", "/" + "x" * 300, "/dev/null"])
def test_a_home_that_cannot_be_used_becomes_one_in_the_cache(tmp_path, home):
    found = Path(prepare(tmp_path, HOME=home)["HOME"])
    assert found.is_dir()
    assert found.resolve() == (tmp_path / f"mobilemoe-cache-{os.getuid()}" / "home").resolve()


def test_a_relative_home_means_the_same_for_children_elsewhere(tmp_path):
    assert prepare(tmp_path, HOME="house [1]")["HOME"] == str(tmp_path / "house [1]")


def test_without_the_variable_the_home_is_that_of_the_user(tmp_path):
    assert prepare(tmp_path, HOME=None)["HOME"] == pwd.getpwuid(os.getuid()).pw_dir


@pytest.mark.parametrize("name", ["x [v1] #1", "{a,b}*?", "ümläut 中"])
def test_a_folder_for_temporary_files_of_any_name_is_used(tmp_path, name):
    (tmp_path / name).mkdir()
    used = Path(prepare(tmp_path, TMPDIR=str(tmp_path / name))["TMPDIR"])
    assert used.resolve() == (tmp_path / name).resolve()


@pytest.mark.parametrize("name", ["absent", "/proc", "/dev/null", ""])
def test_a_folder_for_temporary_files_that_cannot_be_used_is_replaced(tmp_path, name):
    folder = Path(prepare(tmp_path, TMPDIR=name, HOME=str(tmp_path))["TMPDIR"])
    assert folder in (Path("/tmp"), Path("/var/tmp"), Path("/usr/tmp"), tmp_path)


def test_a_link_to_a_folder_that_is_gone_is_removed_by_the_next_one(tmp_path, monkeypatch):
    """Each job of Slurm has a folder of another name."""
    monkeypatch.setattr("core.environment.find_socket_folder", lambda longest: tmp_path)
    (tmp_path / f"{LINK_PREFIX}file").touch()
    for name in ("1", "2"):
        folder = tmp_path / ("x" * 100) / name
        folder.mkdir(parents=True)
        link = Path(_shorten(str(folder)))
        assert link.is_symlink() and link.samefile(folder)
        assert {path.name for path in tmp_path.glob(f"{LINK_PREFIX}*")} == {f"{LINK_PREFIX}file", link.name}
        folder.rmdir()


def test_a_link_that_cannot_be_followed_stays(tmp_path, monkeypatch):
    """Linux does not follow another user's link in /tmp, and such a link must not end the run."""

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("core.environment.find_socket_folder", lambda longest: tmp_path)
    (tmp_path / f"{LINK_PREFIX}other").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(Path, "exists", refuse)
    link = _shorten("/" + "x" * 100)
    assert {os.path.basename(link), f"{LINK_PREFIX}other"} == set(os.listdir(tmp_path))


def test_no_folder_for_temporary_files_at_all_is_refused(monkeypatch):
    from core.environment import prepare_environment
    from core.errors import RefusedInput

    def find_none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", find_none)
    with pytest.raises(RefusedInput, match=r"No usable temporary directory.*set TMPDIR"):
        prepare_environment()


def test_what_a_launcher_left_is_removed(tmp_path):
    assert not set(prepare(tmp_path, **LAUNCHED)) & set(LAUNCHED)


@pytest.mark.parametrize("before", ["", "/lib:", "."])
def test_children_find_our_packages_before_the_working_directory(tmp_path, before):
    """An empty part of PYTHONPATH means the working directory."""
    for name in ("data", "eval", "titan_ext"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    environment = prepare(tmp_path, PYTHONPATH=f"{ROOT}:{before}:")
    assert environment["PYTHONSAFEPATH"] == "1"
    code = "import data, eval, titan_ext; print(data.__path__[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{ROOT / 'data'}\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_cache_of_another_user_is_refused(tmp_path):
    folder = tmp_path / f"mobilemoe-cache-{os.getuid()}"
    folder.mkdir(mode=0o755)
    os.chown(folder, NOBODY, NOBODY)
    done = run_prepare(tmp_path, HOME="/proc/nobody")
    assert "can be written by another user" in done.stderr and "set MOBILEMOE_CACHE" in done.stderr
