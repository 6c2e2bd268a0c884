"""This script runs in a process of its own, shuts itself in, and becomes an interpreter of code that is not trusted.

    python -I -S sandbox_child.py SPEC < CODE

SPEC is the JSON of `eval.benchmarks.sandbox.Limits`, and `report`, a file descriptor: what goes wrong before the code
runs is written there. Imports nothing of this project, so that it starts fast.

The process gets namespaces of its own: no network, no other processes, no files but the interpreter's and the
libraries', read-only, and a small /tmp in memory. It has no capabilities left when the code starts.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
FIRST_USER = 1_900_000_000
"""User ids that no file belongs to. Each sandbox of root has one of its own, because processes are counted by user."""
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
MOUNT_POINTS = ("/mnt", "/media", "/srv", "/tmp")
"""Folders of which one holds the new root; the mount is seen by this process alone."""

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a function of libc; raise OSError where it returns -1."""
    if getattr(libc, name)(*(a.encode() if isinstance(a, str) else a for a in arguments)) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main(spec: dict) -> None:
    """Shut the process in and run the code of stdin in it; ends with the code's exit code."""
    code, interpreter = sys.stdin.buffer.read(), os.path.realpath(sys.executable)
    user, group, is_root = os.getuid(), os.getgid(), os.getuid() == 0
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    namespaces = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    call("unshare", namespaces if is_root else namespaces | CLONE_NEWUSER)
    if not is_root:
        for name, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    wait_for_child(spec["report"])  # what follows is process 1 of the namespace, with which all others die
    enter_new_root(spec["disk_bytes"])
    if is_root:
        user = FIRST_USER + spec["number"]
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which takes it back
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    set_limits(spec)
    wait_for_child(spec["report"])  # the code is not process 1, to which most signals do nothing
    with open("main.py", "wb") as file:
        file.write(code)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.closerange(3, 64)
    os.execve(interpreter, [interpreter, "-I", "-S", "main.py"], {})


def wait_for_child(report: int) -> None:
    """Fork; the parent gives up `report`, ends as the child does, and does not return."""
    if child := os.fork():
        os.close(report)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


def enter_new_root(disk_bytes: int) -> None:
    """Make a root folder of what an interpreter needs, read-only, with a /tmp of `disk_bytes`, and enter it."""
    call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    root = next(path for path in MOUNT_POINTS if os.path.isdir(path) and not sys.base_prefix.startswith(path))
    call("mount", "tmpfs", root, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for path in (*LIBRARIES, *DEVICES, sys.base_prefix):
        if os.path.islink(path):
            make_parent(root + path)
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path) and not os.path.exists(root + path):
            bind(path, root + path)
    os.mkdir(f"{root}/tmp")
    os.mkdir(f"{root}/old")
    call("mount", "tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},mode=1777")
    os.chdir(root)
    call("pivot_root", ".", "old")
    os.chdir("/tmp")
    call("umount2", "/old", MNT_DETACH)
    os.rmdir("/old")
    call("mount", None, "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID, None)


def bind(source: str, target: str) -> None:
    """Show a file or folder at another path, read-only where it is no device."""
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        make_parent(target)
        open(target, "w").close()
    call("mount", source, target, None, MS_BIND | MS_REC, None)
    if not source.startswith("/dev/"):
        call("mount", None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, None)


def make_parent(path: str) -> None:
    """Make the folder that a path lies in."""
    os.makedirs(os.path.dirname(path), exist_ok=True)


def set_limits(spec: dict) -> None:
    """Bound what this process and its children may take, each."""
    limits = {
        resource.RLIMIT_CPU: spec["cpu_seconds"], resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_NPROC: spec["processes"], resource.RLIMIT_FSIZE: spec["disk_bytes"],
        resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0,
    }  # fmt: skip
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    try:
        main(specification)
    except Exception as error:
        os.write(specification["report"], str(error).encode())
        os._exit(1)
