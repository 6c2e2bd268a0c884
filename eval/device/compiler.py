"""This module runs a C++ compiler; what it makes appears whole or not at all."""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.errors import RefusedInput


def compile_file(compiler: str, arguments: Sequence[str], out: Path, *, what: str, advice: str) -> None:
    """Compile to `out`, whose folder is created.

    Args:
        compiler: name or path of the compiler; words after it, as in "zig c++", are its first arguments.
        arguments: flags, sources and libraries.
        what: what is compiled, for the error.
        advice: what to do where there is no such compiler.

    Raises:
        RefusedInput: the compiler is not on the path, or it fails. Nothing is left behind.
    """
    words = shlex.split(compiler)
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise RefusedInput(f"{what} is compiled, and no C++ compiler was found ({compiler}); {advice}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=out.parent, suffix=out.suffix, delete=False) as partial:
        command = [found, *words[1:], *arguments, "-o", partial.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        os.unlink(partial.name)
        raise RefusedInput(f"{compiler} could not build {what}:\n{done.stderr[-2000:]}")
    os.replace(partial.name, out)
