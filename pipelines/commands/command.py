"""`Command`, one entry of the table of subcommands, with the parsing and the output that all of them share."""

import difflib
import json
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import tyro
from rich.console import RenderableType

from core.errors import RefusedInput
from pipelines.printing import print_result

Address = typing.NewType("Address", str)
"""A path, or an address such as s3://bucket/name."""


@dataclass(frozen=True)
class Command:
    """One subcommand of `mobilemoe`."""

    arguments: type
    """Dataclass of its arguments; tyro builds the options from it. The first line of its docstring is the summary."""
    handle: Callable[[Any], None]
    """Function that does the work, given an object of that class. It raises if it fails."""
    parse: Callable[[Sequence[str]], Any] | None = None
    """Function that turns the words after the subcommand into an object of that class, where `parse_arguments` does not
    serve: the first word names a preset, which the options then change."""

    @property
    def summary(self) -> str:
        """First line of the help."""
        return (self.arguments.__doc__ or "").splitlines()[0]


class UsageShown(Exception):
    """The words ask for help that tyro does not give; the message is the help."""

    def __init__(self, text: str, *, asked: bool):
        self.asked = asked
        """True if the user asked for help, False if words are missing."""
        super().__init__(text)


def parse_arguments(kind: type, words: Sequence[str], name: str, default: Any = tyro.MISSING_NONPROP) -> Any:
    """Return an object of the dataclass `kind` with the options in `words`.

    Args:
        name: subcommand, with its preset if it has one.
        default: object whose fields the options replace.

    Raises:
        SystemExit: 2 for a wrong option, after tyro has printed the closest ones; 0 after --help.
        RefusedInput: a path is empty.
    """
    refuse_empty_paths(kind, words)
    return tyro.cli(
        kind, args=words, default=default, prog=f"mobilemoe {name}", description=kind.__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip


def refuse_empty_paths(kind: type, words: Sequence[str]) -> None:
    """Check that no positional argument, and no option of `kind` that takes a path or an address, is an empty text.

    `Path("")` is the working directory, which nobody means by it: a shell variable was not set.

    Raises:
        RefusedInput: one is; the message names it.
    """
    types = typing.get_type_hints(kind)
    options = {
        f"--{name.strip('_').replace('_', '-')}"
        for name, kind in types.items()
        if "Path" in str(kind) or Address.__name__ in str(kind)
    }
    for before, word in pairwise(("", *words)):
        option = before if word == "" and before in options else word[:-1] if word[:-1] in options else ""
        if option:
            raise RefusedInput(f"{option}: an empty text is no path; name a file or a folder, or leave the option out")
        if word == "" and not before.startswith("--"):
            raise RefusedInput("an argument is an empty text; name a file, a folder or an address")


def require_known(kind: str, name: str, choices: Collection[str]) -> None:
    """Check that `name` is one of `choices`.

    Raises:
        RefusedInput: it is not; the message lists them, and the closest one.
    """
    if name not in choices:
        close = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise RefusedInput(f"{name!r} is no {kind}; choose one of {', '.join(choices)}.{hint}")


def emit_result(as_json: bool, value: dict[str, Any], format_result: Callable[[], RenderableType]) -> None:
    """Print a command's result on stdout.

    Args:
        as_json: print `value` as one JSON object.
        format_result: function that returns the result as text or as a rich table, called if `as_json` is False.
    """
    if as_json:
        print(json.dumps(value))
    else:
        print_result(format_result())
