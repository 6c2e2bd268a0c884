"""The steps `items` and `data`: benchmark items, then the tokenizer and the shards that training reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from core.atomic import atomic_write
from core.errors import RefusedInput
from core.progress import Progress
from core.stages import heldout_folder
from data.config import DataConfig
from eval.benchmarks.suites import get_suite
from eval.config import EvaluationConfig
from pipelines.recipe import Recipe
from pipelines.steps.context import Context
from pipelines.steps.fetch import list_packages

GENERATED_ITEMS = 500
"""Number of items of a generated benchmark."""


def prepare_items(context: Context) -> None:
    """Write the benchmark items, and their texts for the decontamination of the corpora."""
    config = context.recipe.evaluation
    folder = Path(config.items_folder) if config.items_folder else None
    suite = get_suite(config.suite, config.benchmarks)
    arguments = (
        list_packages(context.run), context.run / "items", context.progress("items"), config.allow_missing_items,
        folder, list_generated(config),
    )  # fmt: skip
    made = context.run_job("items", prepare_items_on_worker, arguments, cpus=1)
    wanted = {benchmark.key for benchmark in suite}
    if left_out := [key for key in made["missing"] if key in wanted]:
        context.log_line(f"items: {', '.join(left_out)} have none, and are left out; see items/items.json")


def list_generated(config: EvaluationConfig) -> list[str]:
    """Return the benchmarks of an evaluation whose items are generated."""
    suite = get_suite(config.suite, config.benchmarks)
    return [benchmark.key for benchmark in suite if benchmark.items.place == "generated"]


def generate_items(benchmarks: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of generated benchmarks, by benchmark."""
    from data.readers.generated_questions import make_benchmark

    return {key: make_benchmark(key.removeprefix("questions_"), GENERATED_ITEMS) for key in benchmarks}


def prepare_items_on_worker(
    packages: dict[str, Path],
    out: Path,
    progress: Progress,
    allow_missing: bool,
    folder: Path | None,
    generated: Sequence[str],
) -> dict[str, Any]:
    """Write the benchmark items into `out` and return the content of its items.json."""
    from eval.benchmarks import items

    return items.prepare(packages, out, progress, allow_missing, folder, generate_items(generated))


def prepare_data(context: Context) -> None:
    """Write the shards and the tokenizer; after an interruption `data.pipeline` continues in the partial folder.

    Raises:
        RefusedInput: a stage wants a domain that the shards lack (`check_domains`).
    """
    run, recipe = context.run, context.recipe
    with atomic_write(run / "data", keep_partial=True) as out:
        texts = run / "items" / "benchmark_texts.jsonl"
        # On one machine forked processes start at once, where each Ray worker imports for seconds.
        executor = "local" if context.require_cluster().local else "ray"
        arguments = (recipe.data, recipe.seed, list_packages(run), texts, out, executor, context.progress("data"))
        # This job only coordinates. It holds no CPU of the cluster, so that they all go to the processes it starts.
        context.run_job("data", prepare_data_on_worker, arguments, cpus=0)
        check_domains(recipe, out)
        _log_corpora(context, out)


def prepare_data_on_worker(
    config: DataConfig,
    seed: int,
    packages: dict[str, Path],
    texts: Path,
    out: Path,
    executor: Literal["local", "ray"],
    progress: Progress,
) -> None:
    """Write tokenizer and shards into `out` with datatrove.

    Args:
        seed: decides, together with a document's text, its split, and seeds the generated corpora.
        texts: JSON lines of benchmark texts, for the decontamination.
        executor: processes of this node, or the Ray cluster.
    """
    from data import pipeline

    pipeline.prepare(
        config, seed=seed, packages=packages, benchmark_texts=texts, out=out, progress=progress, executor=executor
    )


def _log_corpora(context: Context, data: Path) -> None:
    """Show which corpora the shards were made of, and what replaced those whose package is missing."""
    made = json.loads((data / "data_manifest.json").read_text(encoding="utf-8"))
    kept = [f"{name} {corpus['kept']:,}" for name, corpus in made["corpora"].items()]
    context.log_line(f"data: documents kept of {', '.join(kept)}")
    for entry in made["missing"]:
        replacement = entry["fallback"] or "nothing"
        context.log_line(f"data: without {entry['corpus']} ({entry['package']}), instead {replacement}")


def check_domains(recipe: Recipe, data: Path) -> None:
    """Check that every domain of every stage's mixture has shards, and every stage a held-out set.

    A corpus whose package is missing may leave a domain empty. The stage that reads it could only say so hours later.

    Raises:
        RefusedInput: a domain with a share above 0 has no shards, or a held-out folder is empty.
    """
    for name, stage in recipe.stages.items():
        if not stage.steps:
            continue
        for folder in (f"shards/{stage.shards}", f"heldout/{heldout_folder(stage.shards)}"):
            present = sorted(index.parent.name for index in (data / folder).glob("*/index.json"))
            absent = [domain for domain, share in stage.mixture.items() if share and domain not in present]
            if absent and folder.startswith("shards"):
                raise RefusedInput(
                    f"stages.{name}.mixture: {folder} has no {', '.join(absent)}, only {', '.join(present)}; a package "
                    "is missing (see `fetch`): get it (--from fetch), or set the share to 0 and raise the others"
                )
            if not present:
                raise RefusedInput(
                    f"data.heldout_fraction = {recipe.data.heldout_fraction}: {folder} is empty; raise it"
                )
