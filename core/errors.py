"""Tell errors that the user can correct from failures in the middle of a step."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RefusedInput(ValueError):
    """The program cannot use the user's input. The message states field, value, rule and way out.

    Raised before any work has started, the command prints the message and exits with 2. Raised inside of a running
    step, it is a failure like any other (exit code 1).
    """


class DamagedData(RuntimeError):
    """A file that was complete when it was written is now missing, truncated or changed.

    The message names the file and the way out. The command exits with 1.
    """


class TransferFailed(RuntimeError):
    """Sending or receiving files was cut off: a full disk, a lost connection. The command exits with 1.

    The message names address and reason. The same command continues.
    """


OTHER_FORM = (
    ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, struct.error,
)  # fmt: skip
"""What code raises that takes apart a value of another form than it was written for."""


@contextmanager
def report_damage(path: Path | str, way_out: str) -> Iterator[None]:
    """Turn an error of OTHER_FORM into a DamagedData; use it around the few lines that read a file's content.

    Raises:
        DamagedData: the block raised one; names the file, the error and the way out.
    """
    try:
        yield
    except (RefusedInput, DamagedData):
        raise
    except OTHER_FORM as error:
        raise DamagedData(
            f"{path} is damaged, or was written by another program ({type(error).__name__}: {error}); {way_out}"
        ) from error


@contextmanager
def refuse_value_errors() -> Iterator[None]:
    """Turn a ValueError of the block into a RefusedInput with the same text.

    Use it around code that reads a user's file through a library, or through eval/hf_mobilemoe, whose files are copied
    into exported folders and therefore cannot import this package.

    Raises:
        RefusedInput: the block raised a ValueError.
    """
    try:
        yield
    except RefusedInput:
        raise
    except ValueError as error:
        raise RefusedInput(str(error)) from error
