"""Faults of what a run finds around it: the disk, its own files, the lock of its folder, the clock."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import core.lease
from core.stages import STAGE_FOLDERS
from pipelines.engine.run_lock import LEASE
from tests.faults import forked
from tests.faults.injection import Injection
from tests.faults.trial import Broken, Fault, Trial

HALF = "pretrain-half"
"""Snapshot of a run that was killed in the middle of pre-training, with two checkpoints."""
LARGE = 256 << 20


def fill_disk(room: int) -> Callable[[Trial], str]:
    """Return what lets a run's disk fill up while its step is at work, until `room` bytes are left."""

    def disturb(trial: Trial) -> str:
        with mounted(trial.run) as resize:
            driver = trial.start()
            wait_until(lambda: read_state(trial) == "running", driver)
            trial.note_fault()
            resize(room)
            code = trial.wait(driver)
            if code == 0:
                raise Broken("the room was enough, so nothing was shown")
            said = "No space left" in trial.log.read_text(errors="replace")
            state = read_state(trial)
            resize(LARGE)
            if not said:
                raise Broken(f"exit {code}, and nothing said that the disk is full: {trial.read_log_end()}")
            return f"exit {code} (disk full named), state {state}; {trial.finish()}"

    return disturb


def make_read_only(trial: Trial) -> str:
    """Give the command while its folder is read-only."""
    with mounted(trial.run):
        subprocess.run(["mount", "-o", "remount,ro", trial.run], check=True)
        trial.note_fault()
        code, said = trial.wait(trial.start()), trial.read_log_end()
        subprocess.run(["mount", "-o", "remount,rw", trial.run], check=True)
        if code == 0 or "Read-only" not in said:
            raise Broken(f"exit {code}: {said}")
        return f"exit {code} (read-only named); {trial.finish()}"


@contextmanager
def mounted(folder: Path) -> Iterator[Callable[[int], None]]:
    """Put a folder on a tmpfs for the block; yields a function that sets the bytes which are left on it."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={LARGE}", "none", folder], check=True)

    def resize(room: int) -> None:
        stat = os.statvfs(folder)
        used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        subprocess.run(["mount", "-o", f"remount,size={used + room}", folder], check=True)

    try:
        shutil.copytree(aside, folder, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(aside)
        yield resize
    finally:
        subprocess.run(["mount", "-o", f"remount,rw,size={LARGE}", folder], check=True)
        shutil.copytree(folder, aside, symlinks=True, dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()
        aside.rename(folder)


def read_state(trial: Trial) -> str:
    """Return the state of the trial's step in the manifest."""
    manifest = trial.run / "manifest.json"
    steps = json.loads(manifest.read_text())["steps"] if manifest.exists() else {}
    return steps.get(trial.until, {"state": "pending"})["state"]


def wait_until(holds: Callable[[], bool], driver: object) -> None:
    """Wait for a moment of a run.

    Raises:
        Broken: the driver ended before.
    """
    while not holds():
        if driver.exitcode is not None:
            raise Broken("the command ended before the moment came")
        time.sleep(0.02)


def damaged_checkpoints() -> list[Fault]:
    """Return damages of each kind of file of the newest checkpoint."""
    promise = "the checkpoint before is used, and the log names the file"
    combinations = [
        *(("__0_0.distcp", damage) for damage in ("flip", "cut", "empty", "missing")), ("__1_0.distcp", "flip"),
        (".metadata", "flip"), (".metadata", "cut"), (".metadata", "missing"), ("SHA256SUMS", "flip"),
        ("SHA256SUMS", "missing"),
    ]  # fmt: skip
    return [
        Fault(f"{name} of the newest checkpoint: {damage}", "pretrain", promise, damage_checkpoint(name, damage), HALF)
        for name, damage in combinations
    ]


def damage_checkpoint(name: str, damage: str) -> Callable[[Trial], str]:
    """Return what damages a file of the newest checkpoint of a killed run."""

    def disturb(trial: Trial) -> str:
        stage = trial.run / STAGE_FOLDERS["pretrain"]
        newest = max(int(path.name.removeprefix("step-")) for path in stage.glob("checkpoint/step-*"))
        damage_file(stage / f"checkpoint/step-{newest}/{name}", damage)
        trial.note_fault()
        ended = trial.finish()
        text = (stage / "logs/rank_0.log").read_text()
        if f"the checkpoint of step {newest} is damaged" in text:
            return f"{ended}; put aside and named"
        if f"step-{newest} was not finished, and is removed" in text:
            return f"{ended}; removed as not finished"
        if name == "SHA256SUMS" and damage == "missing":
            return f"{ended}; used, as one of an older version"
        raise Broken(f"{ended}; the damage was not named")

    return disturb


def damage_file(path: Path, damage: str) -> None:
    """Flip a bit in the middle of a file, cut it in half, empty it or remove it."""
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])


def damaged_caches() -> list[Fault]:
    """Return damages of shards: in the cache, and at their source."""
    return [
        Fault(f"every shard in the cache: {damage}", "pretrain", "fetched again, with the same result",
              damage_cache(damage))
        for damage in ("flip", "cut", "empty")
    ] + [
        Fault("the shard itself: flip", "pretrain", "refused by name; restored, the command goes on", damage_source)
    ]  # fmt: skip


def damage_cache(damage: str) -> Callable[[Trial], str]:
    """Return what damages all shards in the cache between two drivers."""

    def disturb(trial: Trial) -> str:
        cache = trial.run.with_name(f"{trial.run.name}.cache")
        shutil.rmtree(cache, ignore_errors=True)
        trial.options += ["--cluster.shard-cache.folder", str(cache)]
        code = trial.inject(Injection("pretrain.rank0", ".metadata", "kill-driver", number=2))
        shards = [path for path in cache.rglob("*.mds*") if path.is_file()]
        for path in shards:
            damage_file(path, damage)
        ended = trial.finish()
        shutil.rmtree(cache)
        if not shards:
            raise Broken("the cache has no shards")
        return f"exit {code}, {len(shards)} shards damaged; {ended}"

    return disturb


def damage_source(trial: Trial) -> str:
    """Damage a training shard of the run, and restore it."""
    cache = trial.run.with_name(f"{trial.run.name}.cache")
    shutil.rmtree(cache, ignore_errors=True)
    trial.options += ["--cluster.shard-cache.folder", str(cache)]
    path = next((trial.run / "data/shards/pretrain").rglob("*.mds.zstd"))
    content = path.read_bytes()
    damage_file(path, "flip")
    trial.note_fault()
    code, said = trial.wait(trial.start()), trial.log.read_text(errors="replace")
    path.write_bytes(content)
    logs = "".join(file.read_text(errors="replace") for file in trial.run.glob("logs/pretrain*"))
    if code == 0 or path.name not in said + logs:
        raise Broken(f"exit {code}, {path.name} not named")
    ended = trial.finish()
    shutil.rmtree(cache, ignore_errors=True)
    return f"exit {code}, named; {ended}"


def locks() -> list[Fault]:
    """Return a second command on one folder, and leases that nobody holds any more."""
    leases = {
        "of a process that has ended": {"pid": _find_free_pid(), "boot": core.lease.read_boot_id()},
        "of before the last start of the machine": {"pid": os.getpid(), "boot": "another"},
        "of another host, which no longer renews it": {"host": "elsewhere", "pid": 1, "boot": "another"},
    }
    return [
        Fault("a second `mobilemoe run` on the folder", "pretrain", "refused; the first one goes on", run_twice),
        *(
            Fault(f"no flock, and a lease {whose}", "items", "taken over", leave_lease(lease))
            for whose, lease in leases.items()
        ),
    ]  # fmt: skip


def _find_free_pid() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def run_twice(trial: Trial) -> str:
    """Start a second command while the first one trains."""
    first = trial.start()
    wait_until(lambda: read_state(trial) == "running", first)
    trial.note_fault()
    second = trial.start()
    second.join()
    code = trial.wait(first)
    if (second.exitcode, code) != (2, 0) or "another driver" not in trial.log.read_text(errors="replace"):
        raise Broken(f"exit {second.exitcode} of the second, {code} of the first")
    return "the second exit 2, the first exit 0"


def leave_lease(lease: dict[str, object]) -> Callable[[Trial], str]:
    """Return what leaves a lease on a file system that has no flock."""

    def disturb(trial: Trial) -> str:
        own = {"owner": "another", "host": socket.gethostname(), "renewed": 3}
        (trial.run / LEASE).write_text(json.dumps(own | lease))
        trial.note_fault()
        with without_flock():
            ended = trial.finish()
        if (trial.run / LEASE).exists():
            raise Broken("the lease stayed")
        return ended

    return disturb


@contextmanager
def without_flock() -> Iterator[None]:
    """Let processes that are forked in the block have a file system without flock, and wait 2 s for another host."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def enter(_: str) -> None:
        fcntl.flock = refuse
        core.lease.STALE_SECONDS = 2.0

    forked.WATCH.append(enter)
    try:
        yield
    finally:
        forked.WATCH.remove(enter)


def clocks() -> list[Fault]:
    """Return jumps of the clock by a day."""
    promise = "nothing ends or begins anew for it"
    return [
        Fault(f"the clock of {process} jumps a day {way}", "pretrain", promise, jump(process, target, way))
        for process, target in (("driver", "manifest.json"), ("pretrain.rank0", "SHA256SUMS"))
        for way in ("forward", "back")
    ]


def jump(process: str, target: str, way: str) -> Callable[[Trial], str]:
    """Return what lets the clock of a process jump."""

    def disturb(trial: Trial) -> str:
        code = trial.inject(Injection(process, target, way, number=2))
        if code != 0:
            raise Broken(f"exit {code}: {trial.read_log_end()}")
        seconds = json.loads((trial.run / "manifest.json").read_text())["steps"]["pretrain"]["seconds"]
        if not 0 <= seconds < 3600:
            raise Broken(f"the manifest states {seconds} s")
        return f"exit 0, {seconds} s in the manifest"

    return disturb
