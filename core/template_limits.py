"""Bounds for chat templates, which come with models of others: time, memory, and no single step that takes hours.

A template is a program. Jinja's sandbox keeps it from files and from Python's internals, but it may loop for ever or
fill the memory. `limit_rendering` ends both. It cannot end a single operation of native code, so `find_unbounded`
refuses the few that can take very long on little memory: powers, products of two unknown numbers, and filters that
search with patterns.
"""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from core.errors import RefusedInput

SECONDS = 10.0
"""Most time of one rendering. A long conversation takes milliseconds."""
MEMORY_BYTES = 1 << 30
"""Most memory that one rendering may take."""
_SLOW_FILTERS = {"urlize", "wordwrap", "striptags", "xmlattr", "pprint"}
_PRODUCTS = {"*", "/", "//", "%"}
_CODE = ("operator", "string", "integer", "float", "name")
_LITERALS = ("string", "integer", "float")


class TemplateTooSlow(Exception):
    """A template took more than SECONDS."""


def find_unbounded(tokens: Iterable[tuple[int, str, str]]) -> str | None:
    """Return what a template must not do, None if it does nothing of it.

    Args:
        tokens: what `jinja2.Environment().lex(text)` yields: line, kind and text of each.
    """
    code = [("", ""), *((kind, text) for _, kind, text in tokens if kind in _CODE), ("", "")]
    for before, (left_kind, _), (_, text), (right_kind, _), after in zip(
        [("", ""), *code], code, code[1:], code[2:], [*code[3:], ("", "")], strict=False
    ):
        if text == "**":
            return "it computes a power"
        if text in _SLOW_FILTERS:
            return f"it uses the filter {text}"
        left_known = left_kind in _LITERALS and before[1] not in (_PRODUCTS | {"."})
        right_known = right_kind in _LITERALS and after[1] not in (".", "[", "(", "|", "**")
        if text == "*" and not left_known and not right_known:
            return "it multiplies two values neither of which it states"
    return None


def check_templates(found: str | dict[str, str] | None, lex: Callable[[str], Iterable[tuple[int, str, str]]]) -> None:
    """Check the chat templates of a tokenizer: one, several by name, or none.

    Args:
        lex: `jinja2.Environment().lex`; this package imports the standard library alone.

    Raises:
        RefusedInput: one is no template, or does what `find_unbounded` finds.
    """
    for text in [found] if isinstance(found, str) else (found or {}).values():
        try:
            problem = find_unbounded(lex(text))
        except Exception as error:  # jinja2's TemplateSyntaxError has no class of this library above it
            problem = f"it is no template ({error})"
        if problem:
            raise RefusedInput(
                f"chat template: {problem}, and a template of others must not take the machine; give the tokenizer one "
                "that does not, in chat_template.jinja"
            )


@contextmanager
def limit_rendering() -> Iterator[None]:
    """Bound time and memory of the block, which must be Python code of this thread.

    Raises:
        TemplateTooSlow: it took more than SECONDS.
        MemoryError: it took more than MEMORY_BYTES. Linux alone knows this bound, and it holds for all threads.
    """
    watch = _Watch.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_find_limit(soft, hard), hard))
    try:
        yield
    except TemplateTooSlow:
        watch.fired = False  # it has arrived
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        watch.stop()


def _find_limit(soft: int, hard: int) -> int:
    try:
        with open("/proc/self/statm", "rb") as file:
            wanted = int(file.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    except FileNotFoundError:  # another system than Linux, which does not hold a process to such a limit
        return soft
    return min([wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])


class _Watch:
    """The end of one rendering, looked after by one thread of the process."""

    _lock = threading.Condition()
    _watches: ClassVar[set["_Watch"]] = set()
    _process = 0

    def __init__(self) -> None:
        self.thread, self.end, self.fired = threading.get_ident(), time.monotonic() + SECONDS, False

    @classmethod
    def start(cls) -> "_Watch":
        watch = cls()
        with cls._lock:
            if cls._process != os.getpid():  # a thread does not live on in a forked process
                cls._process = os.getpid()
                cls._watches.clear()
                threading.Thread(target=cls._look, daemon=True, name="template-watch").start()
            cls._watches.add(watch)
            if len(cls._watches) == 1:
                cls._lock.notify()
        return watch

    def stop(self) -> None:
        """End the watch. An exception that is on its way to this thread arrives here, and not later."""
        with self._lock:
            self._watches.discard(self)
            fired = self.fired
        if fired:
            time.sleep(1)
            raise TemplateTooSlow  # the template has caught the first one

    @classmethod
    def _look(cls) -> None:
        while True:
            with cls._lock:
                while not cls._watches:
                    cls._lock.wait()
                for watch in [watch for watch in cls._watches if watch.end < time.monotonic()]:
                    watch.fired = True
                    cls._watches.discard(watch)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(watch.thread), ctypes.py_object(TemplateTooSlow)
                    )
            time.sleep(min(0.2, SECONDS / 4))
