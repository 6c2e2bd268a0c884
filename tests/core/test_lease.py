"""Leases: what stands in for flock where a file system has none."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core import lease
from core.lease import LeaseHeld, hold_lease, hold_lock, read_lease
from pipelines.engine import run_lock
from pipelines.engine.run_lock import RunLocked, find_driver, lock_run

ROOT = Path(__file__).parents[2]
NO_FLOCK_LIBRARY = """
#include <errno.h>
int flock(int descriptor, int operation) { errno = ENOSYS; return -1; }
"""
HOLDER = """
import pathlib, sys, time
from pipelines.engine.run_lock import lock_run
with lock_run(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def fast(monkeypatch):
    for name, value in (("RENEW_SECONDS", 0.05), ("STALE_SECONDS", 3.0), ("POLL_SECONDS", 0.02)):
        monkeypatch.setattr(lease, name, value)


@pytest.fixture(autouse=True)
def lost(monkeypatch):
    """How often a holder was to be ended; a list with one entry each time."""
    calls = []
    monkeypatch.setattr(lease, "end_process", lambda: calls.append(1))
    return calls


@pytest.fixture
def without_flock(monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def write_foreign(path, renewed=0, **changes):
    content = {"owner": "x", "host": "another", "pid": 7, "boot": "b", "renewed": renewed} | changes
    path.write_text(json.dumps(content))


def test_one_process_holds_it_and_gives_it_back(tmp_path, fast):
    path = tmp_path / "lease"
    with hold_lease(path):
        assert read_lease(path)["pid"] == os.getpid()
        first = read_lease(path)["renewed"]
        with pytest.raises(LeaseHeld, match=f"pid {os.getpid()} on host"), hold_lease(path):
            pytest.fail("two hold it")
        assert read_lease(path)["renewed"] > first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("attempt", range(2))
def test_of_many_that_find_a_stale_one_at_once_one_gets_it(attempt, tmp_path, monkeypatch, lost):
    for name, value in (("RENEW_SECONDS", 0.02), ("STALE_SECONDS", 3.0), ("POLL_SECONDS", 0.001)):
        monkeypatch.setattr(lease, name, value)
    held, refused, start = [], [], threading.Barrier(8)

    def work():
        start.wait()
        try:
            with hold_lease(tmp_path / "lease"):
                held.append(1)
                time.sleep(1.5)
        except LeaseHeld:
            refused.append(1)

    write_foreign(tmp_path / "lease")
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused), lost) == (1, 7, [])
    assert list(tmp_path.iterdir()) == []


def test_what_a_process_left_that_was_killed_while_it_took_one_is_no_obstacle(tmp_path, fast):
    write_foreign(tmp_path / "lease")
    write_foreign(tmp_path / "lease.removing")
    with hold_lease(tmp_path / "lease"):
        assert read_lease(tmp_path / "lease")["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [{"host": None, "pid": 2**22 + 5}, {"host": None, "pid": os.getpid(), "boot": "before the last start"}],
    ids=["its process ended", "the host started again"],
)
def test_that_of_a_process_of_this_host_that_is_gone_is_taken_at_once(changes, tmp_path):
    own = {"host": os.uname().nodename, "boot": lease.read_boot_id()}
    write_foreign(tmp_path / "lease", **(own | {k: v for k, v in changes.items() if v is not None}))
    start = time.monotonic()
    with hold_lease(tmp_path / "lease"):
        assert time.monotonic() - start < 5
        assert read_lease(tmp_path / "lease")["pid"] == os.getpid()


@pytest.mark.parametrize("clock", [-3600, 3600], ids=["clock behind", "clock ahead"])
def test_that_of_another_host_is_taken_only_if_it_does_not_change(clock, tmp_path, fast):
    path, ended = tmp_path / "lease", threading.Event()

    def renew():
        number = 0
        while not ended.wait(0.1):
            number += 1
            write_foreign(path, number)
            os.utime(path, (time.time() + clock,) * 2)

    write_foreign(path)
    other = threading.Thread(target=renew)
    other.start()
    with pytest.raises(LeaseHeld, match="pid 7 on host another"), hold_lease(path):
        pytest.fail("two hold it")
    ended.set()
    other.join()
    with hold_lease(path):
        assert read_lease(path)["pid"] == os.getpid()


def test_a_lease_in_the_making_is_not_taken(tmp_path, fast):
    path = tmp_path / "lease"
    path.touch()
    timer = threading.Timer(0.2, write_foreign, (path, 1))
    timer.start()
    with pytest.raises(LeaseHeld), hold_lease(path):
        pytest.fail("two hold it")


def test_a_holder_that_lost_it_is_ended(tmp_path, fast, lost):
    with hold_lease(tmp_path / "lease"):
        write_foreign(tmp_path / "lease")
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.01)
    assert lost == [1]
    assert read_lease(tmp_path / "lease")["host"] == "another", "the new holder's lease stays"


def test_to_end_a_process_is_a_signal_that_it_can_answer(monkeypatch):
    monkeypatch.undo()
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        lease.end_process()
        assert ended.wait(10)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_is_locked_without_flock(tmp_path, fast, without_flock, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0)
    assert find_driver(tmp_path) is None
    with lock_run(tmp_path):
        assert find_driver(tmp_path) == f"pid {os.getpid()} on host {os.uname().nodename}"
        with pytest.raises(RunLocked, match="another driver, pid"), lock_run(tmp_path):
            pytest.fail("two drivers")
    assert find_driver(tmp_path) is None


def test_a_lock_that_is_waited_for_comes_when_the_other_ends(tmp_path, fast, without_flock):
    order = []

    def second():
        with (tmp_path / "lock").open("w") as file, hold_lock(file, tmp_path / "lease"):
            order.append("second")

    with (tmp_path / "lock").open("w") as file, hold_lock(file, tmp_path / "lease"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_other_errors_of_flock_are_errors(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken disk"), lock_run(tmp_path):
        pytest.fail("it is not locked")


def test_processes_on_a_file_system_without_flock(tmp_path):
    """A library in front of the system's says ENOSYS, as Lustre does: two drivers, and one after a kill."""
    (tmp_path / "no_flock.c").write_text(NO_FLOCK_LIBRARY)
    library = tmp_path / "no_flock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "no_flock.c"], check=True)
    run = tmp_path / "run"
    run.mkdir()
    options = {"cwd": ROOT, "env": os.environ | {"LD_PRELOAD": str(library)}, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, **options) as first:
        assert first.stdout.readline() == "held\n"
        second = subprocess.run(command, **options | {"stdout": None}, capture_output=True, check=False, timeout=60)
        assert f"another driver, pid {first.pid} on host" in second.stderr
        first.kill()
    with subprocess.Popen(command, **options) as third:
        assert third.stdout.readline() == "held\n", "a lease of a killed process is taken at once"
        third.kill()
