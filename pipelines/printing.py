"""Printing for people: the one place that makes rich consoles.

Paths, names and messages are printed as they are. rich would otherwise read `[v1]` in a folder's name as markup and
`:smile:` as a picture, and `rich.markup.escape` does not cover every text (a backslash at its end).
"""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from core.printable import make_printable
from core.secret_keys import hide_keys


class PlainConsole(Console):
    """A console that reads no markup, emoji codes or control characters in strings, those in tables included."""

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as text to show, characters that the stream cannot encode written as escapes.

        rich calls this for every string: printed ones, cells, titles and captions.
        """
        shown = make_printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(shown, **options | {"markup": False, "emoji": False})

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError on: the command knows what was done. rich would end the process with 1."""
        raise


def print_result(result: RenderableType) -> None:
    """Print a command's result on stdout. The lines of a string are not broken, so that a path stays in one piece.

    Args:
        result: a string, a table, or a group of them.
    """
    console = PlainConsole()
    for part in result.renderables if isinstance(result, Group) else [result]:
        console.print(part, soft_wrap=isinstance(part, str))


def print_error(text: str) -> None:
    """Print a message on stderr, without breaking its lines and without keys."""
    PlainConsole(stderr=True).print(hide_keys(text), soft_wrap=True)


def quote_command(*words: str | Path) -> str:
    """Return a command in one line, quoted so that a POSIX shell reads the words as they are."""
    return shlex.join(str(word) for word in words)
