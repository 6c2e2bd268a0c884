"""Count the CPUs that this process may use.

A container or a Slurm step often gets a few of a machine's CPUs, and `os.cpu_count()` still returns all of them: a
cluster of that size would run 64 tasks at once on two CPUs, each with a process and its memory.
"""

import math
import os
from pathlib import Path


def count_cpus() -> int:
    """Return the number of CPUs that this process may run on, and no more than its control groups' quota; at least 1.

    A quota of one and a half CPUs counts as two: two processes then share it.
    """
    # On Linux this covers taskset, Slurm's binding and a container's set of CPUs.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, read_cpu_quota())))


def read_cpu_quota(own_groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the smallest CPU quota of this process's control groups and their parents, in CPUs; infinity without one.

    Args:
        own_groups: file with a line ID:CONTROLLERS:PATH for each hierarchy; version 2 has an empty CONTROLLERS.
        root: folder below which the hierarchies are mounted. In a container it may show only the container's own group,
            without the folders of PATH; then the quota stands in the hierarchy's first folder.
    """
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return math.inf
    quotas = [math.inf]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in (root / controllers, root / "cpu") if controllers else (root, root / "unified"):
            group = mount / path.lstrip("/")
            folders = [group, *group.parents]
            quotas += [_read_quota(folder) for folder in folders[: folders.index(mount) + 1]]
    return min(quotas)


def _read_quota(group: Path) -> float:
    """Return the quota of one group in CPUs, from cpu.max of version 2 or the two files of version 1."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group here, or "max"
        return math.inf
