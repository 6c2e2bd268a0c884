"""A run's own folder for temporary files, which is removed with everything in it when the run ends, however it ends.

Ray's workers end without Python's finalizers. Whatever their libraries left in TMPDIR stayed there for ever: the socket
folders of multiprocessing (pymp-*), torchelastic_*, tmp*.
"""

import hashlib
import os
import re
import shutil
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

from core.cache import SHARED_TEMPORARY, find_shared_temporary
from core.lease import is_alive

PREFIX = f"mobilemoe-run-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
"""Beginning of the folders' names, with a hash of the host's name, which may be long. Several hosts may share TMPDIR,
and each knows its own processes alone."""
_NAME = re.compile(rf"{PREFIX}(\d+)-\w+")


def make_temporary_folder() -> Path:
    """Make the folder and return it. Folders of drivers that have ended, and whose reapers have too, are removed."""
    parent = Path(find_shared_temporary())
    for folder in parent.glob(f"{PREFIX}*"):
        match = _NAME.fullmatch(folder.name)
        with suppress(FileNotFoundError):  # another run may be removing it too
            if match and not is_alive(int(match[1])) and folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)  # which leaves links alone
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent))


def enter_temporary_folder(folder: Path) -> None:
    """Let this process, and those that it starts from now on, use the folder that `make_temporary_folder` made."""
    os.environ[SHARED_TEMPORARY] = find_shared_temporary()
    _use(str(folder))


def leave_temporary_folder() -> None:
    """Let this process use the user's folder again, if it does not already."""
    if shared := os.environ.pop(SHARED_TEMPORARY, None):
        _use(shared)


def _use(folder: str) -> None:
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # Python reads TMPDIR again
