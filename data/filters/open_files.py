"""Raises the limit on a process's open files for blocks that open one for every unit at once."""

import resource

from core.errors import RefusedInput

SPARE = 256
"""Number of files that a task has open besides: libraries, logs, sockets."""


def allow_open_files(number: int) -> None:
    """Let this process open `number` files more at once, up to the hard limit that the system sets.

    Raises:
        RefusedInput: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + SPARE
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise RefusedInput(
            f"data.near_duplicates_within: a task of its group opens {number} files at once, and the hard limit of "
            f"this machine is {hard} open files; raise it to {wanted} (`ulimit -Hn`), or search in smaller groups: "
            "corpus"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
