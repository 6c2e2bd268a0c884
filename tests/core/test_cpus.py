"""The number of CPUs: that of the process's binding and of its control groups, not that of the machine."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.cpus import count_cpus, read_cpu_quota


def make_groups(folder, own, files):
    """Write /proc/self/cgroup and the files of control groups, and return the two arguments of `read_cpu_quota`."""
    (folder / "own").write_text(own)
    for name, content in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "own", folder / "mounted"


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "max 100000\n"}, 2),
        ("0::/job/step\n", {"job/cpu.max": "200000 100000\n", "job/step/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/docker/a1b2\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/a:b\n", {"a:b/cpu.max": "300000 100000\n"}, 3),
        (
            "4:cpu,cpuacct:/pod\n3:cpuset:/\n",
            {"cpu,cpuacct/pod/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        ("4:cpu:/docker/a1\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("4:cpuacct,cpu:/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("", {}, math.inf),
        ("0::/\n", {"cpu.max": "\n"}, math.inf),
    ],
)
def test_quota_of_control_groups(tmp_path, own, files, cpus):
    assert read_cpu_quota(*make_groups(tmp_path, own, files)) == cpus


def test_without_control_groups_there_is_no_quota(tmp_path):
    assert read_cpu_quota(tmp_path / "absent", tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "cpus"), [(0.5, 1), (1.5, 2), (math.inf, 3)])
def test_the_smaller_of_binding_and_quota_counts(monkeypatch, quota, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 63}, raising=False)
    monkeypatch.setattr("core.cpus.read_cpu_quota", lambda: quota)
    assert count_cpus() == cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux binds processes to CPUs")
def test_a_process_bound_to_one_cpu_counts_one():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); from core.cpus import count_cpus as c"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(c())"], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "1\n"
