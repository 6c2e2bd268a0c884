"""This module runs a C++ compiler; what it makes appears whole or not at all."""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.cache import find_compiler
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
    found = find_compiler(compiler)
    if found is None:
        raise RefusedInput(f"{what} is compiled, and no C++ compiler was found ({compiler}); {advice}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that the linker makes the file: with the usual permissions, and removed if it fails.
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        partial = Path(folder, out.name)
        command = [*found, *arguments, "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise RefusedInput(f"{compiler} could not build {what}:\n{done.stderr[-2000:]}")
        os.replace(partial, out)
