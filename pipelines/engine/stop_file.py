"""The file by which a driver asks the training of its run to write a checkpoint and to end.

It lies in the run folder, which all nodes see: Ray has no way to reach a function that runs on its workers.
"""

from pathlib import Path


def find_stop_file(run: Path) -> Path:
    """Return the path of the file, which training looks for once a second."""
    return run / ".stop"
