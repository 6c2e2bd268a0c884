"""The arguments of `mobilemoe profile`, `publish` and `fetch`."""

from dataclasses import dataclass
from pathlib import Path

import tyro


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
    """Of the runtime; its own choice if not given."""
    out: Path | None = None
    """Folder of profile.json and pictures; ARTIFACT-profile beside the artifact if not given."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Publish:
    """Send an artifact folder, or all artifacts of a run, to an address; verified, and resumed when called again."""

    source: tyro.conf.Positional[Path]
    """Artifact folder, or run."""
    destination: tyro.conf.Positional[str]
    """Path or address: s3://, gs://, hf://, ssh://."""
    json: bool = False
    """One JSON object on stdout."""


@dataclass(frozen=True)
class Fetch:
    """Bring an artifact from an address into a folder; verified, and resumed when called again."""

    source: tyro.conf.Positional[str]
    """Path or address of an artifact folder: http(s)://, s3://, gs://, hf://, ssh://."""
    folder: tyro.conf.Positional[Path]
    json: bool = False
    """One JSON object on stdout."""
