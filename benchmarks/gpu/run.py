"""Measures what one GPU can tell of training, in nine minutes: correctness, ceilings, tokens a second, kernels.

    python -m benchmarks.gpu.run --out FOLDER [--part NAME ...] [--check NAME ...] [--seconds 540] [--toy]

FOLDER/result.json is written anew after every result, so a run that was cut off still tells what it saw. The same
command goes on with the checks that are not done. A check that does not fit into the rest of the time is skipped, with
a reason, and one that fails does not stop the others. FOLDER/table.md has the tables, FOLDER/log.txt what the checks
printed. docs/gpu.md explains the figures. Without a GPU, only `--toy` is quick.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CHECKS, PARTS, Check
from benchmarks.gpu.table import format_tables
from core.atomic import remove, write_json, write_text
from core.errors import RefusedInput

PACKAGES = ("torch", "triton", "torchtitan", "torchao", "spmd_types", "numpy")
PATIENCE = 3
"""A check is killed after this many times the seconds that it needs, so that one that hangs leaves time for others."""
LOG_CHARACTERS = 3000
"""Number of characters of a check's output, from its end, that the result keeps of a check that was killed."""


def run_checks(out: Path, names: list[str], seconds: float, toy: bool) -> dict[str, Any]:
    """Run the named checks that are not done in `out` yet, and return the result of all.

    Args:
        seconds: time after which no check runs any more.

    Raises:
        RefusedInput: `out` has results of another machine, of other versions, or of another size.
    """
    deadline = time.monotonic() + seconds
    result = open_result(out / "result.json", {"machine": describe_machine(), "toy": toy})
    for name in names:
        if result["checks"].get(name, {}).get("status") == "done":
            continue
        left = deadline - time.monotonic()
        if left < CHECKS[name].needs:
            record = {
                "status": "skipped",
                "reason": f"it takes about {CHECKS[name].needs} s, and {left:.0f} s are left",
            }
        else:
            print(f"{name} ...", flush=True)
            record = run_check(name, CHECKS[name], out, min(left, PATIENCE * CHECKS[name].needs), toy)
        print(f"{name}: {record['status']}, {record.get('seconds', 0):.0f} s", flush=True)
        result["checks"][name] = {"part": CHECKS[name].part, **record}
        write_json(out / "result.json", result)
        write_text(out / "table.md", format_tables(result))
    return result


def open_result(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the result that a run before this one wrote, or an empty one.

    Raises:
        RefusedInput: it is of another machine, of other versions, or of another size.
    """
    if not path.exists():
        return identity | {"checks": {}}
    result = json.loads(path.read_text())
    other = [f"{key}: {result[key]} there, {value} here" for key, value in identity.items() if result[key] != value]
    if other:
        raise RefusedInput(
            f"--out {path.parent}: it has results of another machine ({'; '.join(other)}); name a new one"
        )
    return result


def run_check(name: str, check: Check, out: Path, seconds: float, toy: bool) -> dict[str, Any]:
    """Run one check in a process of its own, for at most `seconds`, and return its record."""
    saved, log = out / "running.json", out / "log.txt"
    remove(saved)
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.checks", name, "--save", str(saved), *(["--toy"] if toy else [])]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if check.on_cpu else {})
    start = time.monotonic()
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(process)
    record = json.loads(saved.read_text()) if saved.exists() else {"status": "unfinished", "found": {}}
    record["seconds"] = time.monotonic() - start
    if record["status"] == "unfinished":
        cause = f"killed after {seconds:.0f} s" if code is None else f"the process ended with {code}"
        printed = log.read_bytes()[begin:].decode(errors="replace")
        record |= {"status": "failed", "reason": cause, "traceback": printed[-LOG_CHARACTERS:]}
    remove(saved)
    return record


def end_session(process: subprocess.Popen) -> None:
    """Kill a check and the processes that it has started; inductor compiles in some."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def describe_machine() -> dict[str, Any]:
    """Return the device, its memory, the driver's CUDA version and the versions of packages."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    else:
        device = {"device": f"CPU ({platform.machine()}, {os.cpu_count()} cores)", "memory_bytes": None, "cuda": None}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**device, "python": platform.python_version(), "packages": versions}


def main() -> None:
    """Run the checks that the command line names, all by default, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME",
                        help="; ".join(CHECKS))  # fmt: skip
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--toy", action="store_true", help="run at the size of a test")
    arguments = parser.parse_args()
    names = [name for name in CHECKS if name in arguments.check and CHECKS[name].part in arguments.part]
    try:
        result = run_checks(arguments.out, names, arguments.seconds, arguments.toy)
    except RefusedInput as error:
        parser.error(str(error))
    print(format_tables(result))
    sys.exit(any(record["status"] == "failed" for record in result["checks"].values()))


if __name__ == "__main__":
    main()
