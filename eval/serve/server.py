"""The HTTP server: OpenAI's interface for one model.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models   GET /health

A page in a browser can send requests to a port of this machine. So a body must be declared as JSON, which a page of
another origin may not send without the server's consent, and on a loopback address the host that the client names must
be one of this machine, which keeps out pages whose name was bound to it.
"""

import asyncio
import hmac
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from core.errors import RefusedInput
from eval.serve.backends import ServedModel
from eval.serve.engine import Engine, Event, Started
from eval.serve.errors import RequestRefused
from eval.serve.generation import Finished
from eval.serve.replies import Replies, count_usage, list_calls
from eval.serve.requests import Request, read_chat, read_completion
from eval.serve.tools import find_tool_calls

MOST_BYTES = 16 << 20
"""Size of a request's body beyond which it is refused."""
SHUTDOWN_SECONDS = 2.0
"""Time that connections get to end when the server does."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(model: ServedModel, hosts: Collection[str] | None = None, api_key: str | None = None) -> web.Application:
    """Return the application that serves a model.

    Args:
        hosts: names of the server that clients may use, its port aside; None takes any.
        api_key: what clients must send as `Authorization: Bearer KEY`; None asks for nothing.
    """
    engine = Engine(model)
    server = _Server(engine)
    app = web.Application(middlewares=[_make_guard(hosts, api_key)], client_max_size=MOST_BYTES)
    app.add_routes(
        [
            web.post("/v1/chat/completions", server.chat),
            web.post("/v1/completions", server.complete),
            web.get("/v1/models", server.list_models),
            web.get("/health", server.report_health),
        ]
    )

    async def close(app: web.Application) -> None:
        await asyncio.to_thread(engine.close)

    app.on_cleanup.append(close)
    return app


async def serve(app: web.Application, host: str, port: int, on_ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        on_ready: called when the server listens.

    Raises:
        RefusedInput: the address cannot be listened at.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            reason = error.strerror or error
            raise RefusedInput(f"--host {host} --port {port}: {reason}; name another port or address") from error
        on_ready()
        await stopped.wait()
    finally:
        await runner.cleanup()


def _make_guard(hosts: Collection[str] | None, api_key: str | None) -> Any:
    """Return the middleware that refuses who may not ask, and turns refusals into answers."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if hosts is not None and urlsplit(f"//{request.host}").hostname not in hosts:
                raise RequestRefused(f"host {request.host!r}: this server is for this machine", status=403)
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if api_key is not None and not hmac.compare_digest(given.encode(), api_key.encode()):
                raise RequestRefused("the API key is missing or wrong", code="invalid_api_key", status=401)
            return await handler(request)
        except RequestRefused as refused:
            return web.json_response(refused.to_json(), status=refused.status)
        except web.HTTPException as error:  # an unknown path or method, a body that is too large
            unserved = RequestRefused(error.reason, status=error.status)
            return web.json_response(unserved.to_json(), status=error.status)

    return guard


class _Server:
    """The handlers."""

    def __init__(self, engine: Engine):
        self._engine = engine

    async def list_models(self, request: web.Request) -> web.Response:
        entry = {"id": self._engine.name, "object": "model", "created": 0, "owned_by": "mobilemoe"}
        return web.json_response({"object": "list", "data": [entry]})

    async def report_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._reply(request, read_chat(await _read_body(request), self._engine.name))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        return await self._reply(request, read_completion(await _read_body(request), self._engine.name))

    async def _reply(self, http: web.Request, request: Request) -> web.StreamResponse:
        async with aclosing(self._engine.answer(request)) as events:  # type: ignore[type-var]  # a generator
            started = await anext(events)
            assert isinstance(started, Started), "an answer begins with its prompt"
            replies = Replies(self._engine.name, request.is_chat)
            if request.stream:
                return await _stream(http, request, replies, started.prompt_tokens, events)
            text, calls, reason, usage = await _collect(request, started.prompt_tokens, events)
            return web.json_response(replies.make_whole(text, calls, reason, usage))


async def _read_body(request: web.Request) -> Any:
    """Return the JSON value of a body."""
    if request.content_type != "application/json":
        raise RequestRefused("the body must be JSON, declared as Content-Type: application/json", status=415)
    try:
        return json.loads(await request.text())
    except (ValueError, RecursionError, LookupError) as error:
        raise RequestRefused(f"the body is not JSON: {error}") from error


async def _collect(request: Request, n_prompt: int, events: AsyncIterator[Event]) -> tuple:
    """Return text, calls of tools, reason of the end, and usage of an answer."""
    pieces: list[str] = []
    async for event in events:
        if isinstance(event, Finished):
            text, usage = "".join(pieces), count_usage(n_prompt, event.tokens)
            names = {tool["function"]["name"] for tool in request.tools}
            calls = find_tool_calls(text, names) if names else []
            return text, calls, "tool_calls" if calls else event.reason, usage
        assert isinstance(event, str)
        pieces.append(event)
    raise AssertionError("an answer has an end")


async def _stream(
    http: web.Request, request: Request, replies: Replies, n_prompt: int, events: AsyncIterator[Event]
) -> web.StreamResponse:
    """Send an answer as server-sent events. Where tools are given it comes in one piece: it may be a call."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(http)

    async def send(value: dict[str, Any] | str) -> None:
        await response.write(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())

    try:
        if request.is_chat:
            await send(replies.make_chunk({"role": "assistant", "content": ""}))
        if request.tools:
            text, calls, reason, usage = await _collect(request, n_prompt, events)
            await send(replies.make_chunk({"tool_calls": list_calls(calls)} if calls else text))
        else:
            async for event in events:
                if isinstance(event, Finished):
                    reason, usage = event.reason, count_usage(n_prompt, event.tokens)
                else:
                    assert isinstance(event, str)
                    await send(replies.make_chunk(event))
        await send(replies.make_chunk("", reason))
        if request.include_usage:
            await send(replies.make_usage_chunk(usage))
        await send("[DONE]")
    except ConnectionError:
        pass  # the client has gone; closing the events gives the answer up
    except RequestRefused as refused:
        await send(refused.to_json())
    except Exception:
        # The status was sent before: without this event the client would take the beginning for the whole answer.
        await send(RequestRefused("the answer failed; the server's log says why", status=500).to_json())
        raise
    return response
