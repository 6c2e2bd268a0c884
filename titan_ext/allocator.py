"""Memory allocation where training runs on the CPU.

Every layer takes and frees blocks of up to hundreds of MB. glibc gives large ones back to the system, and faulting
them in again takes a good part of a step; told to keep them, its heap fragments. tcmalloc keeps them with less of
either, but has to be there when a process starts. docs/benchmarks.md has the figures.
"""

import ctypes
import ctypes.util
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h>


def allocator_environment() -> dict[str, str]:
    """What a process that is going to train on the CPU should start with: tcmalloc preloaded, if this machine has it.

    Empty where it is not installed, or where a library is preloaded already, which may be another allocator.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    return {"LD_PRELOAD": library} if library and "LD_PRELOAD" not in os.environ else {}


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; without effect on another allocator."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # another C library than glibc: only slower
        return
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        libc.mallopt(parameter, value)
