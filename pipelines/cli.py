"""The `mobilemoe` command: parse, dispatch, and turn exceptions into exit codes.

Exit codes: 0 done; 2 refused input, nothing started; 1 failed, resumable; 130 interrupted, resumable.
"""

import sys
import traceback
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from core.errors import DamagedData, RefusedInput
from pipelines.commands import COMMANDS
from pipelines.commands.command import UsageShown, parse_arguments, require_known
from pipelines.engine.step import StepFailed

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(words: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code.

    Args:
        words: what follows `mobilemoe`; the process's own arguments if not given.

    Raises:
        SystemExit: tyro refused an option (2) or showed its help (0).
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(format_usage())
        return DONE if words else REFUSED
    try:
        name, *rest = words
        require_known("command", name, COMMANDS)
        command = COMMANDS[name]
        command.handle(command.parse(rest) if command.parse else parse_arguments(command.arguments, rest, name))
    except UsageShown as usage:
        print(usage)
        return DONE if usage.asked else REFUSED
    except RefusedInput as error:
        print_error(f"refused: {error}")
        return REFUSED
    except StepFailed as error:
        print_error(f"step {error.step} failed: {error}\nlogs: {error.logs}; the same command continues")
        return FAILED
    except DamagedData as error:
        print_error(f"failed: {error}")
        return FAILED
    except KeyboardInterrupt:
        print_error("interrupted; the same command continues")
        return INTERRUPTED
    except Exception:
        # Not foreseen, so the traceback is what helps. A ValueError of a library is no refusal: work had started.
        traceback.print_exc()
        return FAILED
    return DONE


def format_usage() -> str:
    """Return the list of subcommands with their summaries."""
    lines = [f"  {name:12} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: mobilemoe COMMAND ...  (mobilemoe COMMAND --help says more)", "", *lines])


def print_error(text: str) -> None:
    """Print a message on stderr, without breaking its lines and without reading markup in it."""
    Console(stderr=True, soft_wrap=True).print(escape(text), highlight=False)


if __name__ == "__main__":
    sys.exit(main())
