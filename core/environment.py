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
from contextlib import suppress
from pathlib import Path

from core.cache import cache_dir, can_create, keep_compiled_code_apart
from core.errors import RefusedInput

ROOT = Path(__file__).resolve().parent.parent
"""Folder that holds our packages."""
LONGEST_TEMPORARY = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of the longest folder in which the sockets of Python's multiprocessing can have their paths."""
SOCKET_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders with short names for sockets, tried after the folder for temporary files and before $XDG_RUNTIME_DIR, which
the system removes when the user logs out: a run may go on."""
LINK_PREFIX = "mobilemoe-tmp-"
"""Beginning of the name of a link to a folder for temporary files."""
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Variables with which torchrun and others tell a process that it is one of many."""
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_")
"""Beginnings of the names of further ones."""


def prepare_environment() -> None:
    """Set the variables that this process and its children need. A second call changes nothing.

    Raises:
        RefusedInput: the working directory was removed, or no folder for temporary files can be written.

    - HOME is a folder that can be written: the user's own, or else one below the cache folder.
    - LOGNAME is set where the system does not know the user.
    - TMPDIR names the folder for temporary files that Python uses, where it named one that cannot be used. A name that
      is too long for the sockets of multiprocessing is replaced by a short link to the same folder.
    - The variables of a launcher such as torchrun are removed.
    - PYTHONSAFEPATH keeps children from importing a `data.py` of the working directory in place of ours.
    - Compiled code is kept apart for every kind of machine (core/cache.py).
    """
    os.environ["TMPDIR"] = _shorten(_find_temporary_folder())
    tempfile.tempdir = None  # Python reads TMPDIR again
    home = Path.home().absolute() if _has_home() else cache_dir() / "home"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(home)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid{os.getuid()}"
    _forget_launcher()
    os.environ["PYTHONSAFEPATH"] = "1"
    _prepare_python_path(_find_working_directory())
    keep_compiled_code_apart()


def _forget_launcher() -> None:
    """Remove the variables that a launcher such as torchrun left in this process's environment.

    This process is no rank of a launcher. With RANK and WORLD_SIZE set, the evaluation would wait for other ranks, for
    weeks; with TORCHELASTIC_USE_AGENT_STORE, no rank of a gang would open the store that all of them connect to.
    """
    for name in [name for name in os.environ if name in LAUNCHER_VARIABLES or name.startswith(LAUNCHER_PREFIXES)]:
        del os.environ[name]


def _shorten(folder: str) -> str:
    """Return a folder's path, or a short link to it where multiprocessing's sockets below it had too long a path.

    The link's name holds a hash of the path, so every run makes the same one. Links to folders that are gone, such as
    those of Slurm's jobs, are removed.
    """
    if len(os.fsencode(folder)) <= LONGEST_TEMPORARY or (parent := find_socket_folder(LONGEST_TEMPORARY - 30)) is None:
        return folder
    for other in parent.glob(f"{LINK_PREFIX}*"):
        with suppress(OSError):  # another rank is removing it too; nor does Linux follow another user's link in /tmp
            if other.is_symlink() and other.lstat().st_uid == os.getuid() and not other.exists():
                other.unlink()
    link = parent / f"{LINK_PREFIX}{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    try:
        link.symlink_to(folder)
    except FileExistsError:
        if not (link.is_symlink() and link.lstat().st_uid == os.getuid() and os.readlink(link) == folder):
            return folder  # somebody else's
    return str(link)


def _find_temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError as error:
        raise RefusedInput(f"{error}: set TMPDIR to a folder that can be written") from error


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


def _prepare_python_path(working_directory: str) -> None:
    """Let children find our packages first, and search the working directory only where the user named it.

    An empty part, as in PYTHONPATH=$PYTHONPATH:/lib, means the working directory and is nobody's choice.
    """
    parts = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    named = any(os.path.abspath(part) == working_directory for part in parts)
    # a checkout that is not installed is found by its name alone
    if named or str(ROOT) in (working_directory, sys.path[0]):
        parts = [str(ROOT), *(part for part in parts if part != str(ROOT))]
    if parts:
        os.environ["PYTHONPATH"] = os.pathsep.join(parts)
    else:
        os.environ.pop("PYTHONPATH", None)


def find_socket_folder(longest: int) -> Path | None:
    """Return a folder for sockets whose path has at most `longest` bytes, or None where there is none.

    The path of a socket has at most 107 bytes on Linux, and a user's folder for temporary files may be longer.
    """
    for candidate in map(Path, [tempfile.gettempdir(), *SOCKET_FOLDERS, os.environ.get("XDG_RUNTIME_DIR", "")]):
        fits = candidate.is_absolute() and len(os.fsencode(candidate)) <= longest
        if fits and candidate.is_dir() and os.access(candidate, os.W_OK | os.X_OK):
            return candidate
    return None
