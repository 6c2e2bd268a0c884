"""Prepare the environment of this process and of every process that it starts, on any machine.

A container may run as a user without an entry in the table of passwords, with a home that is absent or read-only. The
libraries below look into the home and ask for the user's name at import or start: Ray for ~/.ray, torch for the name of
its cache, matplotlib and the hub for their folders.
"""

import getpass
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from core.cache import cache_dir, can_create, keep_compiled_code_apart
from core.errors import RefusedInput

ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds our packages."""
LONGEST_TEMPORARY = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of the longest folder in which the sockets of Python's multiprocessing can have their paths."""
SOCKET_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders with short names for sockets, tried after the folder for temporary files and $XDG_RUNTIME_DIR."""


def prepare_environment() -> None:
    """Set the variables that this process and its children need. A second call changes nothing.

    Raises:
        RefusedInput: the working directory was removed.

    - HOME is a folder that can be written: the user's own, or else one below the cache folder.
    - LOGNAME is set where the system does not know the user.
    - TMPDIR names the folder for temporary files that Python uses, where it named one that cannot be used. A name that
      is too long for the sockets of multiprocessing is replaced by a short link to the same folder.
    - PYTHONSAFEPATH keeps children from importing a `data.py` of the working directory in place of ours.
    - Compiled code is kept apart for every kind of machine (core/cache.py).
    """
    os.environ["TMPDIR"] = _shorten(tempfile.gettempdir())
    tempfile.tempdir = None  # Python reads TMPDIR again
    if not _has_home():
        home = cache_dir() / "home"
        home.mkdir(parents=True, exist_ok=True)
        os.environ["HOME"] = str(home)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    os.environ["PYTHONSAFEPATH"] = "1"
    if str(ROOT) in (
        _find_working_directory(),
        sys.path[0],
    ):  # a checkout that is not installed: its children need it by name
        _prepend_python_path(str(ROOT))
    keep_compiled_code_apart()


def _shorten(folder: str) -> str:
    """Return a folder's path, or a short link to it where multiprocessing's sockets below it had too long a path.

    The link's name holds a hash of the path, so every run makes the same one.
    """
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY or (parent := find_socket_folder(LONGEST_TEMPORARY - 30)) is None:
        return folder
    link = parent / f"mobilemoe-tmp-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    try:
        link.symlink_to(folder)
    except FileExistsError:
        if not (link.is_symlink() and link.lstat().st_uid == os.getuid() and os.readlink(link) == folder):
            return folder  # somebody else's
    return str(link)


def _find_working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise RefusedInput("the working directory was removed; change to one that exists") from error


def _has_home() -> bool:
    try:
        return can_create(Path.home())
    except RuntimeError:  # neither HOME nor an entry in the table of passwords
        return False


def _prepend_python_path(folder: str) -> None:
    present = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if folder not in present:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *present])


def find_socket_folder(longest: int) -> Path | None:
    """Return a folder for sockets whose path has at most `longest` bytes, or None where there is none.

    The path of a socket has at most 107 bytes on Linux, and a user's folder for temporary files may be longer.
    """
    candidates = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *SOCKET_FOLDERS]
    for candidate in filter(None, candidates):
        if len(os.fsencode(candidate)) <= longest and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    return None
