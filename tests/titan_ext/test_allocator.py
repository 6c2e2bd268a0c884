"""Memory of a process after large blocks were freed, under tcmalloc and glibc, each in a process of its own."""

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest

from titan_ext.cpu.allocator import allocator_environment

BLOCKS = """
import ctypes, re, resource, sys
from titan_ext.cpu.allocator import keep_freed_memory
if "limited" in sys.argv:
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
if "kept" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = (ctypes.c_void_p,)
peak_mb = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10
def written(size_mb):
    block = libc.malloc(size_mb << 20)
    libc.memset(block, 1, size_mb << 20)
    return block
before = peak_mb()
first, wall, at_the_end = written(120), written(2), written(100)
libc.free(at_the_end)
longer = written(250)
libc.free(first)
written(90)
grown_mb = peak_mb() - before
libc.free(longer)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
written(250)
print(grown_mb, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
NEEDED_MB = 120 + 2 + 250
"""The block of 90 fits where that of 120 was."""
MOST_FAULTS = 1000
"""Largest number of page faults of the last block, which has 64,000 pages."""

needs_tcmalloc = pytest.mark.skipif(find_library("tcmalloc_minimal") is None, reason="libtcmalloc-minimal4 is missing")


@pytest.fixture(autouse=True)
def nothing_preloaded(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)


def peak_and_faults(environment: dict[str, str], *words: str) -> tuple[int, int]:
    """Return the megabytes by which the process grew at most, and the page faults of the last block."""
    command = [sys.executable, "-c", BLOCKS, *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    peak_mb, faults = map(int, done.stdout.split())
    return peak_mb, faults


@needs_tcmalloc
def test_tcmalloc_in_one_piece_uses_what_was_written_to_before():
    peak_mb, faults = peak_and_faults(allocator_environment(), "kept")
    assert NEEDED_MB <= peak_mb < NEEDED_MB + 40 and faults < MOST_FAULTS


@needs_tcmalloc
def test_tcmalloc_as_it_is_prefers_what_is_left_of_its_growth():
    """When this fails, `_reserve_addresses` can go."""
    assert peak_and_faults(allocator_environment())[0] >= NEEDED_MB + 80


@needs_tcmalloc
def test_without_the_addresses_training_starts_all_the_same():
    peak_mb, faults = peak_and_faults(allocator_environment(), "kept", "limited")
    assert peak_mb >= NEEDED_MB and faults < MOST_FAULTS


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_glibc_keeps_large_blocks():
    assert peak_and_faults({}, "kept")[1] < MOST_FAULTS < peak_and_faults({})[1]


@needs_tcmalloc
def test_a_preloaded_library_stays(monkeypatch):
    assert allocator_environment()["LD_PRELOAD"] == find_library("tcmalloc_minimal")
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert allocator_environment() == {}
