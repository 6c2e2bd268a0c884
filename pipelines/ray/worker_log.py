"""Send the output of a worker to a log file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.inside import refuse_links


@contextmanager
def redirect_output(log: Path) -> Iterator[None]:
    """Append stdout and stderr of this process to a file while the block runs.

    The file descriptors are redirected and not only `sys.stdout`: native code and child processes write to them too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0, opener=refuse_links) as file:
        saved = [os.dup(1), os.dup(2)]
        try:
            _point_output_to(file.fileno(), file.fileno())
            yield
        finally:
            _point_output_to(*saved)
            for descriptor in saved:
                os.close(descriptor)


def _point_output_to(stdout: int, stderr: int) -> None:
    # Python's buffers belong to the old target, so they are written out before the descriptors change.
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
