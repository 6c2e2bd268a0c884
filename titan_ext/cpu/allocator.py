"""Memory allocation where training runs on the CPU.

Every layer takes and frees blocks of up to hundreds of MB. glibc gives large ones back to the system, and faulting
them in again takes a good part of a step; told to keep them, its heap fragments. tcmalloc keeps them with less of
either, but has to be there when a process starts. docs/benchmarks.md has the figures.
"""

import ctypes
import ctypes.util
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h>
_MOST_ADDRESSES = 64 << 30
"""tcmalloc's table of pages takes a thousandth of the addresses it has."""


def allocator_environment() -> dict[str, str]:
    """What a process that is going to train on the CPU should start with: tcmalloc preloaded, if this machine has it.

    Told to give nothing back to the system. Empty where it is not installed, or where a library is preloaded already,
    which may be another allocator.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    if library is None or "LD_PRELOAD" in os.environ:
        return {}
    return {"LD_PRELOAD": library, "TCMALLOC_RELEASE_RATE": "0"}


def keep_freed_memory() -> None:
    """Have the allocator keep what is freed for the next allocation: glibc's, and tcmalloc, which does, in one piece.

    Without effect on another allocator. To be called before the first large allocation.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tc_malloc"):
        _grow_in_one_piece(libc)
    elif hasattr(libc, "mallopt"):
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            libc.mallopt(parameter, value)


def _grow_in_one_piece(tcmalloc: ctypes.CDLL) -> None:
    """Take addresses, not memory, for most of the machine's memory, as Linux refuses all, and leave them to tcmalloc.

    tcmalloc takes the smallest free block that fits. What is left over where it grew is such a block, and it goes
    before a larger one whose pages were written to already, so the process grows. With all addresses free from the
    start, the block that nothing was written to is the largest and goes last. Where the system refuses, it stays as it
    was.
    """
    tcmalloc.tc_malloc.restype, tcmalloc.tc_malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    tcmalloc.tc_free.restype, tcmalloc.tc_free.argtypes = None, (ctypes.c_void_p,)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    tcmalloc.tc_free(tcmalloc.tc_malloc(min(memory * 9 // 10, _MOST_ADDRESSES)))
