"""Memory allocation where training runs on the CPU (9 in titan_ext/cpu/__init__.py). Imports no torch.

Every layer allocates and frees blocks of up to hundreds of MB. glibc returns large blocks to the system, and faulting
them in again takes a good part of a step. When it is told to keep them, its heap fragments. tcmalloc keeps them with
less of either, but it must be preloaded when the process starts. docs/benchmarks.md has the figures.
"""

import ctypes
import ctypes.util
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h>
_MAX_RESERVED_BYTES = 64 << 30
"""Upper limit of the address space to reserve, in bytes. tcmalloc's page table takes a thousandth of its address
space."""


def allocator_environment() -> dict[str, str]:
    """Return the environment variables that preload tcmalloc in a process that will train on the CPU.

    The variables also tell tcmalloc to return no memory to the system. The result is empty where tcmalloc is not
    installed, and where another library is preloaded already, because that may be an allocator too.
    """
    library = ctypes.util.find_library("tcmalloc_minimal")
    if library is None or "LD_PRELOAD" in os.environ:
        return {}
    return {"LD_PRELOAD": library, "TCMALLOC_RELEASE_RATE": "0"}


def keep_freed_memory() -> None:
    """Make the allocator keep freed memory for the next allocation.

    glibc stops returning memory to the system. tcmalloc does so already; it reserves its address space in one piece.
    Another allocator stays as it is. Call this before the first large allocation.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tc_malloc"):
        _reserve_addresses(libc)
    elif hasattr(libc, "mallopt"):
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            libc.mallopt(parameter, value)


def _reserve_addresses(tcmalloc: ctypes.CDLL) -> None:
    """Reserve address space, not memory, for nine tenths of the machine's memory, and give it to tcmalloc.

    tcmalloc takes the smallest free block that fits. When it has to grow, the rest of the new piece is a free block
    that was never written to. tcmalloc prefers it to a larger block whose pages are in memory already, so the process
    grows. With all addresses reserved from the start, the block that was never written to is the largest one and is
    taken last. Linux refuses to reserve all of the memory, so this function asks for nine tenths. Where Linux refuses
    that too, tcmalloc stays as it was.
    """
    tcmalloc.tc_malloc.restype, tcmalloc.tc_malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    tcmalloc.tc_free.restype, tcmalloc.tc_free.argtypes = None, (ctypes.c_void_p,)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # The block is never written to, so it takes no memory. tcmalloc keeps its addresses after the call of tc_free.
    tcmalloc.tc_free(tcmalloc.tc_malloc(min(memory * 9 // 10, _MAX_RESERVED_BYTES)))
