"""The command of this package: build the phone's benchmark, or write a checkpoint as its model file."""

import argparse
import sys
from pathlib import Path

from core.errors import DamagedData, RefusedInput
from eval.device import phone_bench
from eval.export.source import open_folder


def main() -> int:
    """Run the command; return 2 for refused input."""
    parser = argparse.ArgumentParser(prog="python -m eval.device.phone_bench", description=phone_bench.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile the static program and write the shapes of all flavors")
    build.add_argument("--out", type=Path, required=True, help="folder of the program and the shapes")
    build.add_argument("--compiler", default=phone_bench.ARM_COMPILER, help="a C++ compiler for the phone's processor")
    weights = commands.add_parser("weights", help="write a model file")
    weights.add_argument("folder", type=Path, help="Hugging Face folder, INT4 or not")
    weights.add_argument("--out", type=Path, required=True, help="the model file")
    options = parser.parse_args()
    try:
        if options.command == "build":
            phone_bench.build(options.out, options.compiler)
        else:
            phone_bench.write_model(open_folder(options.folder), options.out)
    except (RefusedInput, DamagedData, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
