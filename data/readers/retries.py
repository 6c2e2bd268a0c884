"""Try again what a store or a hub refused for a moment: a lost connection, a time-out, too many requests."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

WAITS = (1.0, 5.0, 20.0, 60.0, 300.0)
"""Seconds before each further try."""
TRANSIENT_STATUS = (408, 425, 429, *range(500, 600))
TRANSIENT_NAMES = {
    "ClientConnectionError", "ClientPayloadError", "ServerTimeoutError",  # aiohttp
    "ConnectionError", "Timeout", "ChunkedEncodingError",  # requests
    "TransportError", "IncompleteRead", "ProtocolError",  # httpx, http.client, urllib3
    "EndpointConnectionError", "ConnectionClosedError", "ReadTimeoutError",  # botocore
}  # fmt: skip
"""Names of classes of errors, so that packages which are not installed need not be imported."""


def is_transient(error: BaseException) -> bool:
    """Return whether an error, or one that it comes from, may be gone after a while."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if {kind.__name__ for kind in type(error).__mro__} & TRANSIENT_NAMES:
            return True
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if status in TRANSIENT_STATUS:
            return True
        error = error.__cause__ or error.__context__ or error
    return False


def retry(function: Callable[[], T], what: str) -> T:
    """Return what a function returns; call it again after each transient error, until the waits are used up."""
    for wait in WAITS:
        try:
            return function()
        except Exception as error:
            if not is_transient(error):
                raise
            _pause(error, what, wait)
    return function()


def retry_rows(read: Callable[[], Iterator[T]], what: str) -> Iterator[T]:
    """Yield the rows of a file; after a transient error read it again and go on behind the rows that were yielded.

    The waits begin anew with every row that comes.
    """
    done, tried_at, tries = 0, -1, 0
    while True:
        try:
            for number, row in enumerate(read()):
                if number >= done:
                    yield row
                    done += 1
            return
        except Exception as error:
            tries = tries + 1 if tried_at == done else 1
            tried_at = done
            if tries > len(WAITS) or not is_transient(error):
                raise
            _pause(error, what, WAITS[tries - 1])


def _pause(error: Exception, what: str, seconds: float) -> None:
    """Say a transient error, and wait."""
    log.warning("%s: %s: %s; again in %.0f s", what, type(error).__name__, error, seconds)
    time.sleep(seconds)
