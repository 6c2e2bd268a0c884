"""Functions for the gangs of the tests, in a module of their own: Ray's workers import it as they do the steps."""

import getpass
import json
import multiprocessing.forkserver
import os
import signal
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from core.cache import find_shared_temporary


def killed_once(out: Path) -> None:
    """Init gloo from the environment alone and sum the ranks; on the first attempt rank 1 dies of SIGKILL before."""
    dist.init_process_group("gloo")
    marker = out / "was_killed"
    if dist.get_rank() == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    total_1 = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total_1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    seen = " ".join(f"{name}={os.environ[name]}" for name in names)
    seen += f" tcmalloc={'libtcmalloc' in Path('/proc/self/maps').read_text()}"
    (out / f"rank{dist.get_rank()}").write_text(f"sum={total_1.item():g} {seen}")
    print("reduced", total_1.item())
    dist.destroy_process_group()


def raises(out: Path) -> None:
    """Rank 1 meets a fault of its own."""
    if os.environ["RANK"] == "1":
        raise KeyError("a fault of rank one")


def task(text: str, fail: bool) -> str:
    """A plain task: prints, then answers or raises."""
    print("task says", text)
    if fail:
        raise ValueError(f"{text} is not wanted")
    return text.upper()


def describe_process() -> dict[str, str]:
    """Return where this process found our rooms, where it works and for whom."""
    import core
    import data
    import eval as evaluation

    rooms = {module.__name__: str(Path(module.__file__).parent.parent) for module in (core, data, evaluation)}
    return rooms | {
        "cwd": os.getcwd(),
        "user": f"{os.getuid()}:{os.getgid()} {getpass.getuser()}",
        "home": os.path.expanduser("~"),
        "inductor": os.environ["TORCHINDUCTOR_CACHE_DIR"],
        "rank": f"{os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}",
        "meets_at": f"{os.environ.get('MASTER_ADDR')} {os.environ.get('TORCHELASTIC_USE_AGENT_STORE')}",
    }


def write_process(out: Path) -> None:
    """Write `describe_process` of rank 0 to gang.json."""
    (out / "gang.json").write_text(json.dumps(describe_process()))


def leave_litter() -> tuple[str, str]:
    """Leave in the folder for temporary files what libraries leave there; return it, and the one that runs share.

    A fork server has its socket in a folder pymp-*, which Python's finalizers remove, and Ray's workers run none.
    """
    multiprocessing.forkserver.ensure_running()
    tempfile.mkdtemp()
    assert list(Path(tempfile.gettempdir()).glob("pymp-*"))
    return tempfile.gettempdir(), find_shared_temporary()


def wait_at_work(folder: Path) -> None:
    """Meet over gloo, then stay until there is a file `go`."""
    dist.init_process_group("gloo")
    dist.barrier()
    (folder / f"met{dist.get_rank()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    dist.destroy_process_group()
