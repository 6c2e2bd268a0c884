"""`Engine`: one model, one answer at a time; the other requests wait in line."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from eval.serve.backends import ServedModel
from eval.serve.chat_prompt import PromptEncoder
from eval.serve.errors import RequestRefused
from eval.serve.generation import Finished, check_length, generate
from eval.serve.requests import Request

MOST_WAITING = 32
"""Number of requests in line, the one that is computed included; more are told to come again."""


@dataclass(frozen=True)
class Started:
    """The prompt is accepted, and its answer begins."""

    prompt_tokens: int


Event = Started | str | Finished


class Engine:
    """Answers requests in a thread of its own, in which alone the model is used."""

    def __init__(self, model: ServedModel):
        self.name = model.name
        self._model, self._encoder = model, PromptEncoder(model.tokenizer)
        self._thread = ThreadPoolExecutor(1, "model")
        self._waiting = 0

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """Yield the start of an answer, its pieces and its end. To close the iterator gives the answer up.

        Raises:
            RequestRefused: the prompt cannot be rendered or is too long, or too many requests wait.
        """
        if self._waiting >= MOST_WAITING:
            raise RequestRefused(f"{self._waiting} requests wait; come again later", code="overloaded", status=429)
        loop, cancelled = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()

        def work() -> None:
            try:
                for event in self._compute(request, cancelled):
                    loop.call_soon_threadsafe(events.put_nowait, event)
            except BaseException as error:  # it is raised below, where the request is answered
                loop.call_soon_threadsafe(events.put_nowait, error)

        self._waiting += 1
        job = self._thread.submit(work)
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            cancelled.set()
            job.cancel()
            self._waiting -= 1

    def close(self) -> None:
        """Wait for the thread, whose answers have been given up."""
        self._thread.shutdown(cancel_futures=True)

    def _compute(self, request: Request, cancelled: threading.Event) -> Iterator[Event]:
        if cancelled.is_set():
            return
        if request.prompt is None:
            ids = self._encoder.encode_chat(request.messages, request.tools)
        else:
            ids = self._encoder.encode_text(request.prompt)
        check_length(len(ids), self._model.context, request.sampling)
        yield Started(len(ids))
        yield from generate(self._model, ids, request.sampling, cancelled.is_set)
