"""`mobilemoe serve`: an artifact behind OpenAI's interface on this machine."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from core.errors import RefusedInput
from pipelines.commands import inputs
from pipelines.commands.command import emit_result

API_KEY = "MOBILEMOE_API_KEY"
"""Environment variable of the key that clients must send. An option would show it to every user of the machine."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that are reached from this machine alone."""
MOST_PORT = 65535


@dataclass(frozen=True)
class Serve:
    """Serve an artifact through OpenAI's interface (chat, completions, streaming, tools), one answer at a time."""

    artifact: tyro.conf.Positional[Path]
    """A .pte file or its folder, or an INT4 or BF16 folder, for example RUN/artifacts/int4."""
    host: str = "127.0.0.1"
    """Address to listen at. Others than this machine's need a key in the environment, MOBILEMOE_API_KEY."""
    port: int = 8080
    """Port to listen at."""
    threads: int | None = None
    """Threads of the runtime; its own choice if not given."""
    json: bool = False
    """One JSON object on stdout when the server is ready."""


def serve(arguments: Serve) -> None:
    """Load the artifact and serve it until the process is interrupted.

    Raises:
        RefusedInput: no artifact, a number out of its range, an address that cannot be listened at, or one that other
            machines reach, without a key.
    """
    artifact = arguments.artifact
    if artifact.suffix == ".pte":
        inputs.require_file("ARTIFACT", artifact)
    else:
        inputs.require_folder("ARTIFACT", artifact)
    inputs.require_between("--port", arguments.port, 1, MOST_PORT)
    inputs.require_between("--threads", arguments.threads, 1, os.cpu_count() or 1)
    api_key = os.environ.get(API_KEY) or None
    is_local = arguments.host in LOOPBACK
    if api_key is None and not is_local:
        raise RefusedInput(
            f"--host {arguments.host}: other machines may reach it, and anyone could ask; set {API_KEY} to a key that "
            "clients must send, or leave the option out"
        )
    import asyncio

    from eval.serve.backends import load_model
    from eval.serve.server import build_app
    from eval.serve.server import serve as listen

    model = load_model(artifact, arguments.threads)
    app = build_app(model, LOOPBACK if is_local else None, api_key)

    def announce() -> None:
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        url = f"http://{host}:{arguments.port}/v1"
        ready = {"url": url, "model": model.name, "context": model.context}
        emit_result(arguments.json, ready, lambda: f"{model.name}, {model.context:,} tokens of context: {url}")
        sys.stdout.flush()  # a program that started this one waits for the line

    asyncio.run(listen(app, arguments.host, arguments.port, announce))
