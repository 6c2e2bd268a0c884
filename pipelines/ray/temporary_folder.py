"""A run's own folder for temporary files, which is removed with everything in it when the run ends, however it ends.

Ray's workers end without Python's finalizers. Whatever their libraries left in TMPDIR stayed there for ever: the socket
folders of multiprocessing (pymp-*), torchelastic_*, tmp*.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path

from core.cache import SHARED_TEMPORARY, find_shared_temporary
from core.lease import is_alive

PREFIX = "mobilemoe-run-"
_NAME = re.compile(rf"{PREFIX}(\d+)-\w+")


def make_temporary_folder() -> Path:
    """Make the folder, and let this process and those that it starts from now on use it; return it.

    Folders of drivers that have ended, and whose reaper was ended as well, are removed.
    """
    parent = Path(find_shared_temporary())
    for folder in parent.glob(f"{PREFIX}*"):
        match = _NAME.fullmatch(folder.name)
        if match and not is_alive(int(match[1])) and folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)  # another run may be removing it too
    own = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=parent)
    os.environ[SHARED_TEMPORARY] = str(parent)
    _use(own)
    return Path(own)


def leave_temporary_folder() -> None:
    """Let this process use the user's folder again."""
    _use(os.environ.pop(SHARED_TEMPORARY))


def _use(folder: str) -> None:
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None  # Python reads TMPDIR again
