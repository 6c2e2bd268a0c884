"""Generated code: what it may do, and hostile samples that try what it may not."""

import ast
import getpass
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import RefusedInput
from eval.benchmarks import sandbox
from eval.benchmarks.sandbox import Limits, run_untrusted

SHORT = Limits(seconds=3, cpu_seconds=2)
WALK = Limits(seconds=120, cpu_seconds=60)
"""Enough to look at every file that there is: the libraries alone are 140,000."""


@pytest.fixture(scope="module", autouse=True)
def available():
    try:
        run_untrusted("")
    except RefusedInput as error:
        pytest.skip(str(error))


def run(code, limits=SHORT):
    return run_untrusted(textwrap.dedent(code), limits)


def count_processes(mark):
    """Processes of this machine whose command or user says that they are of a sandbox."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += mark.encode() in (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    return found


def test_ordinary_code_runs_with_the_standard_library():
    code = """
        import collections, dataclasses, decimal, functools, hashlib, heapq, itertools, json, math, random, re, string
        from typing import List
        with open("/tmp/own", "w") as file:
            file.write("kept")
        print(math.comb(5, 2), open("/tmp/own").read(), "é")
    """
    outcome = run(code)
    assert outcome.passed and outcome.output == "10 kept é\n"


@pytest.mark.parametrize(
    "code, exit_code", [("assert 1 == 2", 1), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_code_that_fails_does_not_pass(code, exit_code):
    outcome = run(code)
    assert (outcome.exit_code, outcome.passed) == (exit_code, False)


def test_a_secret_is_neither_in_files_nor_in_the_environment_nor_in_other_processes(tmp_path, monkeypatch):
    secret = "hf_planted_secret"
    (tmp_path / "token").write_text(secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    outcome = run(
        f"""
        import os, subprocess
        seen = []
        for path in ({str(tmp_path / "token")!r}, os.path.expanduser("~/.cache/huggingface/token"), "/etc/passwd",
                     "/etc/shadow", {__file__!r}, "/proc/1/environ", "/proc/self/environ", "/root/.ssh"):
            try:
                seen.append(open(path).read())
            except OSError as error:
                seen.append(type(error).__name__)
        for root, folders, files in os.walk("/"):
            for name in files:
                if name in ("token", "passwd", "shadow"):
                    seen.append(os.path.join(root, name))
        print(seen, dict(os.environ))
    """,
        WALK,
    )
    assert outcome.passed and secret not in outcome.output
    seen = ast.literal_eval(outcome.output[: outcome.output.index("]") + 1])
    assert set(seen) <= {"FileNotFoundError", "PermissionError", "NotADirectoryError"}
    assert "HF_TOKEN" not in outcome.output and getpass.getuser() + "@" not in outcome.output


def test_nothing_is_written_outside(tmp_path):
    outcome = run(f"""
        import os, sys
        refused = 0
        places = ({str(tmp_path)!r}, "/", "/usr/lib", "/lib", "/dev", sys.base_prefix, os.path.dirname(os.__file__),
                  "/var", "/home", "/mnt")
        for place in places:
            try:
                with open(place + "/written", "w") as file:
                    file.write("x")
            except OSError:
                refused += 1
        try:
            open(os.__file__, "a")
        except OSError:
            refused += 1
        print(refused == len(places) + 1)
    """)
    assert outcome.output == "True\n"
    assert not list(tmp_path.iterdir()) and not Path("/tmp/main.py").exists()


def test_forks_without_end_are_ended_with_it():
    mark = "sandbox-fork-bomb"
    start = time.monotonic()
    outcome = run(f"""
        import os, time
        name = {mark!r}
        made = 0
        while True:
            try:
                if os.fork() == 0:
                    time.sleep(100)
                made += 1
            except OSError:
                break
        print(made, flush=True)
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """)
    assert outcome.ended_by == "time" or outcome.exit_code == 128 + 9 or outcome.exit_code == 128 + 24
    assert int(outcome.output.split()[0]) < SHORT.processes
    assert time.monotonic() - start < 30
    assert wait_until_gone() == 0


def wait_until_gone():
    """Number of processes that still run code of a sandbox, a moment later."""
    deadline = time.monotonic() + 10
    while (left := count_processes("main.py\0")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_a_child_does_not_outlive_the_code():
    outcome = run("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            time.sleep(100)
    """)
    assert outcome.passed and wait_until_gone() == 0


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.create_connection(('127.0.0.1', {port}), 1)",
        "socket.create_connection(('8.8.8.8', 53), 1)",
        "socket.getaddrinfo('example.com', 80)",
        "socket.socket(socket.AF_UNIX).connect('/tmp/.X11-unix/X0')",
        "socket.socket(socket.AF_UNIX).connect('\\0' + {abstract!r})",
    ],
)
def test_no_socket_leads_anywhere(attempt):
    import socket

    with socket.socket() as server, socket.socket(socket.AF_UNIX) as hidden:
        server.bind(("127.0.0.1", 0))
        server.listen()
        abstract = f"planted-{os.getpid()}"
        hidden.bind("\0" + abstract)
        hidden.listen()
        attempt = attempt.format(port=server.getsockname()[1], abstract=abstract)
        outcome = run(
            f"import socket\ntry:\n    {attempt}\n    print('reached')\nexcept OSError:\n    print('refused')"
        )
    assert outcome.output == "refused\n"


def test_the_disk_is_not_filled():
    before = os.statvfs("/tmp").f_bavail
    outcome = run("""
        written = 0
        try:
            for i in range(1000):
                with open(f"/tmp/{i}", "wb") as file:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            print(written >> 20, type(error).__name__)
    """)
    assert int(outcome.output.split()[0]) <= SHORT.disk_bytes >> 20
    assert before - os.statvfs("/tmp").f_bavail < (64 << 20) / 4096


def test_memory_is_bounded():
    outcome = run("x = bytearray(4 << 30)")
    assert outcome.exit_code == 1 and "MemoryError" in outcome.output


IGNORE_SIGNALS = """
import signal, time
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
time.sleep(1000)
"""


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1000)", IGNORE_SIGNALS])
def test_time_is_bounded_whether_it_computes_or_sleeps(code):
    start = time.monotonic()
    outcome = run_untrusted(code, replace(SHORT, seconds=1, cpu_seconds=1))
    assert not outcome.passed and time.monotonic() - start < 30


def test_output_without_end_is_cut_off():
    outcome = run("while True: print('x' * 1000)")
    assert outcome.ended_by == "output" and len(outcome.output) <= SHORT.output_bytes and not outcome.passed


@pytest.mark.parametrize(
    "attempt",
    [
        "libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
        "libc.mount(b'none', b'/', None, 32, None)",
        "libc.umount2(b'/tmp', 2)",
        "libc.chroot(b'/tmp')",
        "libc.unshare(0x10000000) or libc.mount(b'tmpfs', b'/dev', b'tmpfs', 0, None)",
        "libc.setuid(0)",
        "libc.ptrace(16, 1, 0, 0)",
        "libc.kill(1, 9) or os.getppid() - 1 or -1",
        "libc.mknod(b'/tmp/disk', 0o60666, 8 << 8)",
        "libc.sethostname(b'x', 1)",
        "libc.reboot(0x1234567)",
    ],
)
def test_no_privilege_is_left(attempt):
    outcome = run(f"import ctypes, os\nlibc = ctypes.CDLL(None)\nprint({attempt})")
    assert outcome.output.strip() == "-1", outcome.output


def test_code_cannot_claim_that_there_is_no_sandbox():
    outcome = run("""
        import os, sys
        for fd in range(3, 200):
            try:
                os.write(fd, b"refused")
                print("wrote", fd)
            except OSError:
                pass
        print("sandbox: refused", file=sys.stderr)
        sys.exit(125)
    """)
    assert (outcome.exit_code, outcome.output) == (125, "sandbox: refused\n")


def test_where_there_are_no_namespaces_nothing_runs(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    text = sandbox.CHILD.read_text()
    child.write_text(
        text.replace('    call("unshare"', '    raise OSError(1, "unshare: not permitted")\n    call("unshare"')
    )
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(RefusedInput, match=r"generated code cannot be run: .*not permitted; allow user namespaces"):
        run_untrusted(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


AS_ANOTHER_USER = """
from eval.benchmarks.sandbox import run_untrusted
print(run_untrusted("import os; print(os.getuid(), os.listdir('/tmp'), os.listdir('/'))").output)
print(run_untrusted("import ctypes; print(ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None))").output)
print(run_untrusted("open('/usr/lib/x', 'w')").exit_code)
"""


def test_a_user_without_privileges_has_a_sandbox_too():
    """Its namespaces are those of a user namespace of its own."""
    command = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare cannot make a user namespace")
    command += [sys.executable, "-c", AS_ANOTHER_USER]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    first, second, third = ended.stdout.split("\n\n")
    assert first.startswith("1000 ['main.py'] [") and "home" not in first and "proc" not in first
    assert (second, third.strip()) == ("-1", "1")
