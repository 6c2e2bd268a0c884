"""Build and run the fuzzer of the expert op's C++, with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
DEVICE = HERE.parents[1] / "eval" / "device"
FLAGS = (
    "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
    "-pthread", f"-I{DEVICE}/expert_op", f"-I{DEVICE}/phone_bench",
)  # fmt: skip


def find_compiler() -> str | None:
    """Return g++, None where there is none."""
    return shutil.which("g++")


def build_fuzzer(folder: Path) -> Path:
    """Compile the fuzzer and return the program."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "fuzz_kernels"
    compiler = find_compiler()
    assert compiler, "g++ is missing"
    command = [compiler, *FLAGS, str(HERE / "fuzz_kernels.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    return program


def run_fuzzer(program: Path, first: int, count: int) -> subprocess.CompletedProcess[str]:
    """Run inputs FIRST to FIRST + COUNT; what the reader of model files refuses goes to stderr too."""
    environment = os.environ | {"ASAN_OPTIONS": "abort_on_error=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    environment.pop("LD_PRELOAD", None)  # ASan wants to be the first library
    words = [str(program), str(first), str(count), str(program.with_name("model"))]
    with program.with_name("stderr").open("w+") as errors:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, check=False)
        errors.seek(max(0, errors.tell() - 4000))
        done.stderr = errors.read()
    return done


def fuzz_kernels(folder: Path, first: int, count: int) -> tuple[int, int]:
    """Run the fuzzer at length, print its row of the table, and return its numbers of inputs and of findings."""
    done = run_fuzzer(build_fuzzer(folder), first, count)
    findings = int(done.returncode != 0)
    if findings:
        print("finding: C++", done.stdout[-200:], done.stderr, flush=True)
    print(f"| C++: op and model files, ASan and UBSan | {count:,} | | | {findings} | |", flush=True)
    return count, findings
