"""The steps `items` and `data`: benchmark items, then the tokenizer and the shards that training reads."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from core.atomic import partial_path
from core.errors import RefusedInput
from core.progress import Progress
from core.stages import heldout_folder
from data.config import DataConfig
from eval.benchmarks.suites import get_suite
from eval.config import EvaluationConfig
from pipelines.engine.fingerprints import digest
from pipelines.engine.runner import archive_path
from pipelines.recipe import Recipe
from pipelines.shared_data import SharedData, find_uncovered, receive_data
from pipelines.steps.context import Context
from pipelines.steps.data_parts import identify_parts
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


def prepare_data(context: Context) -> dict[str, Any]:
    """Write the shards and the tokenizer; after an interruption `data.pipeline` continues in the partial folder.

    What the run's former data and the new one have in common is taken over. The former data stays in its place until
    the new one is whole, because other runs may read it.

    Returns:
        the identity of the output, and of each part of it, under `parts`.

    Raises:
        RefusedInput: a stage wants a domain that the shards lack (`check_domains`).
    """
    run, recipe = context.run, context.recipe
    out = partial_path(run / "data")
    if context.shared:
        receive_shared_data(context, context.shared, out)
    else:
        texts = run / "items" / "benchmark_texts.jsonl"
        # On one machine forked processes start at once, where each Ray worker imports for seconds.
        executor = "local" if context.require_cluster().local else "ray"
        arguments = (
            recipe.data, recipe.seed, list_packages(run), texts, out, executor, context.progress("data"), run / "data",
        )  # fmt: skip
        # This job only coordinates. It holds no CPU of the cluster, so that they all go to the processes it starts.
        context.run_job("data", prepare_data_on_worker, arguments, cpus=0)
    check_domains(recipe, out)
    archive_path(run / "data", run, context.log_line)
    os.replace(out, run / "data")
    manifest = json.loads((run / "data" / "data_manifest.json").read_text(encoding="utf-8"))
    _log_corpora(context, manifest)
    identity = digest({key: manifest[key] for key in ("tokenizer", "shards", "heldout")})
    return {"identity": identity, "parts": identify_parts(run / "data")}


def receive_shared_data(context: Context, shared: SharedData, out: Path) -> None:
    """Write to `out` what the run needs of a shared data set, and say which benchmarks it was not searched for."""
    recorded = out / "data_manifest.json"
    if (out / "work").exists() or (recorded.exists() and recorded.read_bytes() != shared.content):
        archive_path(out, context.run, context.log_line)  # the run had begun to make data of its own, or took another's
    receive_data(shared, out, context.progress("data"))
    context.log_line(f"data: of {shared.address}")
    evaluation = context.recipe.evaluation
    names = [benchmark.key for benchmark in get_suite(evaluation.suite, evaluation.benchmarks)]
    if uncovered := find_uncovered(shared, names):
        context.log_line(f"data: not searched for the items of {', '.join(uncovered)}; the training text may have them")


def prepare_data_on_worker(
    config: DataConfig,
    seed: int,
    packages: dict[str, Path],
    texts: Path,
    out: Path,
    executor: Literal["local", "ray"],
    progress: Progress,
    former: Path,
) -> None:
    """Write tokenizer and shards into `out` with datatrove.

    Args:
        seed: decides, together with a document's text, its split, and seeds the generated corpora.
        texts: JSON lines of benchmark texts, for the decontamination.
        executor: processes of this node, or the Ray cluster.
        former: folder of an earlier data set, if there is one, whose corpora are taken over where they are the same.
    """
    from data import pipeline

    pipeline.prepare(
        config,
        seed=seed,
        packages=packages,
        benchmark_texts=texts,
        out=out,
        progress=progress,
        executor=executor,
        former=[former],
    )


def _log_corpora(context: Context, made: dict[str, Any]) -> None:
    """Show which corpora the shards were made of, and what replaced those whose package is missing."""
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
