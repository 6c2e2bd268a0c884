"""Packs what a machine with a GPU, Python 3.12 and torch 2.11, but without network, lacks to run this project.

    python -m benchmarks.gpu.pack [--out .gpu] [--python 3.12]

The folder holds wheels (downloaded by pip, versions of requirements.lock), FSDP2 of this environment's torch, and the
files of benchmarks/gpu/torch211/. Copy it with the repository, and source benchmarks/gpu/environment.sh there. A
machine that has this project's own environment needs none of it.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from core.atomic import atomic_write
from core.errors import RefusedInput
from tests.supply.locked import LOCK, read_pins

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = (
    "brotli", "catalogue", "cramjam", "datasets", "dill", "docstring-parser", "mosaicml-streaming", "multiprocess",
    "python-snappy", "spmd-types", "torch-checkpointing", "torchao", "torchdata", "torchtitan", "typeguard", "tyro",
    "zstd",
)  # fmt: skip
"""Distributions that torchtitan and the loader import beside torch, transformers, numpy and what those bring."""
OTHER_VERSIONS = {("zstd", "3.12"): "1.5.6.1"}
"""(distribution, Python) -> version, where the one of requirements.lock has no wheel."""
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux1")
LARGEST_BYTES = 64 << 20
"""Largest size of the folder. Machines that take a copy for each run take no more."""


def pack(out: Path, python: str) -> None:
    """Write the new folder `out`, complete or not at all. A second call takes up the downloads of one that failed.

    Raises:
        RefusedInput: `out` exists, pip fails, or the folder would be too large.
    """
    if out.exists():
        raise RefusedInput(f"--out {out}: it exists; remove it to pack anew, or name another folder")
    with atomic_write(out, keep_partial=True) as folder:
        download_wheels(folder / "wheels", python)
        copy_site(folder / "site")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if size > LARGEST_BYTES:
            raise RefusedInput(f"--out {out}: {size / 2**20:.0f} MiB are more than {LARGEST_BYTES >> 20}; see {folder}")
    print(f"{out}: {size / 2**20:.1f} MiB, {len(list((out / 'wheels').iterdir()))} wheels for Python {python}")


def download_wheels(folder: Path, python: str) -> None:
    """Download one wheel of each distribution in NAMES, for Linux on x86-64.

    Raises:
        RefusedInput: a wheel does not exist, or pip cannot download it.
    """
    locked = read_pins(LOCK.read_text())
    wanted = [f"{name}=={OTHER_VERSIONS.get((name, python), locked[name])}" for name in NAMES]
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
        python, "--implementation", "cp", *platforms, "--dest", str(folder), *wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RefusedInput(f"pip could not download a wheel for Python {python}:\n{done.stderr.strip()[-2000:]}")


def copy_site(folder: Path) -> None:
    """Copy the files that make torch 2.11 fit, and FSDP2 of the installed torch."""
    from torch.distributed.fsdp import _fully_shard

    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "benchmarks" / "gpu" / "torch211", folder, ignore=ignore)
    shutil.copytree(Path(_fully_shard.__file__).parent, folder / "torch211_fsdp", ignore=ignore)


def main() -> None:
    """Pack the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--python", default="3.12", help="version of Python there")
    arguments = parser.parse_args()
    try:
        pack(arguments.out, arguments.python)
    except RefusedInput as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
