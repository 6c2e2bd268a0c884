"""Find the caches: folders for files that can be made again, such as registry packages and compiled code.

Compiled code is kept apart for each kind of machine. torch's inductor keys its cache by the source and not by the
vector instructions that it compiled for: with AVX-512 code on an AVX2 processor a process dies, and with code that
assumes other vector lengths it computes wrong numbers without a word. A home, an image or /tmp that two kinds of
machine share is enough for that.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from core.errors import RefusedInput

SHARED_TEMPORARY = "MOBILEMOE_SHARED_TMPDIR"
"""Variable with the user's folder for temporary files, where TMPDIR is a run's own, which is removed at its end."""
COMPILED_PREFIX = "compiled-"
"""Beginning of the name of a machine's folder of compiled code."""
LIBRARIES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "TORCH_EXTENSIONS_DIR": "extensions",
}  # fmt: skip
"""Variable that a library reads its cache folder from -> name of the folder."""
CAPABILITY_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "CXX")
"""Variables that choose the instructions or the compiler of compiled code."""
PLAIN_PATH = re.compile(r"[\w./+@%,=-]+", re.ASCII)
"""Paths that inductor's command for the compiler holds in one piece."""
KEYED_PACKAGES = ("torch", "triton")
"""Distributions whose versions decide what compiled code looks like."""


def cache_dir() -> Path:
    """Return the cache folder.

    It is $MOBILEMOE_CACHE, or else ~/.cache/mobilemoe. Where the home is absent or cannot be written, as in many
    containers, it is a folder of this user below the folder for temporary files.
    """
    if chosen := os.environ.get("MOBILEMOE_CACHE"):
        return Path(chosen).expanduser()
    try:
        home = Path("~/.cache/mobilemoe").expanduser()
    except RuntimeError:  # no HOME, and no entry of this user in the table of passwords
        home = None
    if home is not None and can_create(home):
        return home
    return _temporary_cache(find_shared_temporary())


def _temporary_cache(parent: str) -> Path:
    """Return this user's cache below a folder for temporary files.

    Raises:
        RefusedInput: another user can write to it.
    """
    return make_private_folder(Path(parent) / f"mobilemoe-cache-{os.getuid()}", "MOBILEMOE_CACHE")


def find_shared_temporary() -> str:
    """Return the folder for temporary files that several runs share: that of the user, and not the run's own."""
    return os.environ.get(SHARED_TEMPORARY) or tempfile.gettempdir()


def make_private_folder(folder: Path, option: str) -> Path:
    """Make a folder that this user alone can read and write, where others may have made one before; return it.

    Args:
        option: what names another folder, for the message.

    Raises:
        RefusedInput: it is a link, or another user can write to it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RefusedInput(
            f"{folder} can be written by another user, who could put code or data into it; set {option} to a folder "
            "that only you can write"
        )
    if status.st_mode & 0o077:
        folder.chmod(0o700)  # a copy of it has other permissions, and others could read it
    return folder


def can_create(folder: Path) -> bool:
    """Create a folder and return whether this process may write to it. Only the attempt tells: root may write anywhere
    by its permissions, but not on a read-only file system.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def identify_machine() -> str:
    """Return a hash of what decides whether compiled code runs here and computes right.

    It covers the processor's instructions, the variables that restrict them, the C++ compiler, and the versions of
    Python, torch and triton.
    """
    facts = [platform.machine(), platform.system(), sys.version, _read_cpu_flags(), _describe_compiler()]
    facts += [f"{name}={os.environ.get(name, '')}" for name in CAPABILITY_VARIABLES]
    facts += [f"{name}={_read_version(name)}" for name in KEYED_PACKAGES]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _read_cpu_flags() -> str:
    """Return the processor's instruction set extensions, or its name where the system does not list them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return platform.processor()


def _describe_compiler() -> str:
    command = find_compiler(os.environ.get("CXX", "g++"))
    if command is None:
        return "no compiler"
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return f"{shlex.join(command)} {done.stdout}"


def find_compiler(name: str) -> list[str] | None:
    """Return the command of a compiler; None where it is not on the path.

    Args:
        name: name or path of the compiler; words after it, as in "zig c++" or "ccache g++", are its first arguments.
    """
    words = [name] if shutil.which(name) else shlex.split(name)  # a path may have blanks
    found = shutil.which(words[0]) if words else None
    return None if found is None else [found, *words[1:]]


def _read_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def keep_compiled_code_apart() -> None:
    """Point inductor, triton and torch's extensions to caches that only this kind of machine uses.

    Call it before anything is compiled; children inherit the variables. A folder that the user chose becomes the parent
    of a folder of this machine. One with blanks or quotes in its path cannot be used, because inductor splits the
    compiler's command there; the cache is then among the temporary files. A call in a process that inherited the
    variables changes nothing, unless the process runs on another kind of machine than its parent.
    """
    for variable, name in LIBRARIES.items():
        chosen = os.environ.get(variable)
        # Importing torch sets inductor's variable to torch's own default, which is nobody's choice.
        if chosen is None or (variable == "TORCHINDUCTOR_CACHE_DIR" and _is_torch_default(Path(chosen))):
            parent = cache_dir()
        else:
            parent = Path(chosen)
            if parent.parent.name.startswith(COMPILED_PREFIX):
                parent = parent.parent.parent
        if not PLAIN_PATH.fullmatch(str(parent)):
            shared = find_shared_temporary()
            parent = _temporary_cache(shared if PLAIN_PATH.fullmatch(shared) else "/tmp")
        os.environ[variable] = str(parent / f"{COMPILED_PREFIX}{identify_machine()}" / name)


def _is_torch_default(folder: Path) -> bool:
    return folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")
