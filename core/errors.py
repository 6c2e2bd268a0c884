"""Typed errors: what is the user's to mend, as opposed to what went wrong in the middle of a step."""

from collections.abc import Iterator
from contextlib import contextmanager


class RefusedInput(ValueError):
    """The user's input cannot be used; the message states field, value, rule and way out.

    Raised before any work has started: the command prints the message and exits with 2. Inside of a step that runs it
    is a failure like any other.
    """


class DamagedData(RuntimeError):
    """A file that was written whole is now missing, cut short or changed; the message names it and the way out."""


@contextmanager
def refuse_value_errors() -> Iterator[None]:
    """Turn a ValueError of the block into a RefusedInput of the same text.

    For code that reads a user's file through a library, or through the modules that ship inside of artifacts and so
    know nothing of this package.
    """
    try:
        yield
    except RefusedInput:
        raise
    except ValueError as error:
        raise RefusedInput(str(error)) from error
