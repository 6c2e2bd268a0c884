"""`mobilemoe profile`: speed and memory of an artifact on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from core.errors import RefusedInput
from core.progress import print_progress
from pipelines.commands import inputs
from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Profile:
    """Measure speed and memory of an artifact on this machine: an ExecuTorch program, an INT4 or a BF16 folder."""

    artifact: tyro.conf.Positional[Path]
    """Its folder, for example RUN/artifacts/int4 or what `mobilemoe export --format executorch` wrote, or its .pte."""
    prompts: Path | None = None
    """JSON file, domain -> text; three domains come with the program."""
    contexts: str | None = None
    """Tokens of prompt and answer together, with commas; 512,1024,2048,4096 as far as the artifact has room."""
    repetitions: int = 3
    """Runs in each process, of which the medians count."""
    threads: int | None = None
    """Threads of the runtime; its own choice if not given."""
    out: Path | None = None
    """Folder of profile.json and pictures; ARTIFACT-profile beside the artifact if not given."""
    json: bool = False
    """One JSON object on stdout."""


def profile(arguments: Profile) -> None:
    """Measure the artifact and print a table.

    Raises:
        RefusedInput: prompts or contexts that cannot be read, or no artifact.
    """
    texts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    contexts = None if arguments.contexts is None else parse_contexts(arguments.contexts)
    artifact = arguments.artifact
    if artifact.suffix == ".pte" and artifact.is_file():
        artifact = artifact.parent
    inputs.require_folder("ARTIFACT", artifact)
    out = inputs.beside(artifact, "-profile") if arguments.out is None else arguments.out
    inputs.require_apart("--out", out, "ARTIFACT", artifact)
    inputs.require_output_folder("--out", out)
    from eval.device import profile as profiler

    profiler.check_numbers(arguments.repetitions, arguments.threads)
    result = profiler.profile(
        artifact, out, texts=texts, contexts=contexts,
        repetitions=arguments.repetitions, threads=arguments.threads, progress=print_progress,
    )  # fmt: skip
    emit_result(arguments.json, result, lambda: profiler.format_table(result))


def read_prompts(path: Path) -> dict[str, str]:
    """Read the prompts' file, a JSON object domain -> text, in UTF-8 with or without a byte order mark.

    Raises:
        RefusedInput: there is no such file, or it holds something else.
    """
    inputs.require_file("--prompts", path)
    try:
        texts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise RefusedInput(f"--prompts {path}: {error}; give a file with a JSON object, domain -> text") from error
    if not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
        raise RefusedInput(f"--prompts {path}: expected a JSON object, domain -> text")
    return texts


def parse_contexts(text: str) -> list[int]:
    """Parse numbers of tokens with commas between them.

    Raises:
        RefusedInput: one of them is no number.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise RefusedInput(f"--contexts {text}: give numbers of tokens with commas, 512,1024") from error
