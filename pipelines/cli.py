"""The `mobilemoe` command: parse, dispatch, and turn exceptions into exit codes.

Exit codes: 0 done; 2 refused input, nothing started; 1 failed, resumable; 130 interrupted, resumable.
"""

import io
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO

from core.environment import prepare_environment
from core.errors import DamagedData, RefusedInput, TransferFailed
from pipelines.commands import COMMANDS
from pipelines.commands.command import UsageShown, parse_arguments, require_known
from pipelines.engine.step import StepFailed
from pipelines.printing import print_error, print_result

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code.

    A reader of stdout that goes away (`mobilemoe info S | head -1`) is no failure: stdout has results and help alone,
    after the work.

    Args:
        words: what follows `mobilemoe`; the process's own arguments if not given.

    Raises:
        SystemExit: tyro refused an option (2) or showed its help (0).
    """
    if sys.stdout is None:  # closed by `>&-`
        sys.stdout = io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A table's lines, or a path, in a locale that has no such character.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return run_command(list(sys.argv[1:] if words is None else words))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not has_lost_reader(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        # With `2>&1 | head` the progress may have been cut off, and the work with it.
        return FAILED if has_lost_reader(sys.stderr) else DONE


def has_lost_reader(stream: TextIO) -> bool:
    """Return whether a stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False  # closed, or no file of the system


def run_command(words: list[str]) -> int:
    """Run one subcommand and return the exit code.

    Raises:
        SystemExit: tyro refused an option (2) or showed its help (0).
        BrokenPipeError: nobody reads stdout any more.
    """
    if not words or words[0] in ("-h", "--help"):
        print_result(format_usage())
        return DONE if words else REFUSED
    try:
        prepare_environment()
        name, *rest = words
        require_known("command", name, COMMANDS)
        command = COMMANDS[name]
        command.handle(command.parse(rest) if command.parse else parse_arguments(command.arguments, rest, name))
    except UsageShown as usage:
        print_result(str(usage))
        return DONE if usage.asked else REFUSED
    except RefusedInput as error:
        print_error(f"refused: {error}")
        return REFUSED
    except StepFailed as error:
        print_error(f"step {error.step} failed: {error}\nlogs: {error.logs}; the same command continues")
        return FAILED
    except (DamagedData, TransferFailed) as error:
        print_error(f"failed: {error}")
        return FAILED
    except KeyboardInterrupt:
        print_error("interrupted; the same command continues")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and has_lost_reader(sys.stdout):
            raise
        # Not foreseen, so the traceback is what helps. A ValueError of a library is no refusal: work had started.
        print_error(traceback.format_exc())
        return FAILED
    return DONE


def format_usage() -> str:
    """Return the list of subcommands with their summaries."""
    lines = [f"  {name:12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: mobilemoe COMMAND ...  (mobilemoe COMMAND --help says more)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
