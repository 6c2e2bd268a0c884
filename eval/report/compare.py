"""Two runs beside each other: scores and held-out losses of every stage's model, and which differences can be seen."""

from math import hypot
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from eval.benchmarks.suites import list_benchmarks
from eval.report.heldout_tables import HELDOUT_SETS, read_heldout, subtract_losses
from eval.report.scores import MODELS, compare_with_chance, read_result, subtract


def compare_runs(run: Path, other: Path) -> dict[str, Any]:
    """Return what two runs measured on the same things, as `run` minus `other`.

    Returns:
        `benchmarks`: rows of model, benchmark, metric, the two scores (fractions), `difference` (value, stderr,
        verdict) and `paired`: whether it is taken item by item. `heldout`: rows of model, set, the two losses and
        `difference`.
        A verdict is `chance` where the difference is at most two standard errors, else `above` or `below`; None where
        the error is unknown.

    Raises:
        RefusedInput: there is nothing that both have measured.
    """
    benchmarks = [
        _compare_scores(model, benchmark.title, results)
        for model in MODELS
        for benchmark in list_benchmarks()
        if all(results := [read_result(folder / "eval" / model / f"{benchmark.key}.json") for folder in (run, other)])
    ]
    first, second = (read_heldout(folder) for folder in (run, other))
    heldout = [
        {
            "model": MODELS[model],
            "set": title,
            "loss": first[model][kind]["loss"],
            "other": second[model][kind]["loss"],
            "difference": subtract_losses(first[model][kind], second[model][kind]),
        }
        for kind, title in HELDOUT_SETS.items()
        for model in MODELS
        if model in first and model in second
    ]
    if not benchmarks and not heldout:
        raise RefusedInput(
            f"--compare: {run} and {other} have measured nothing that both have; run both as far as eval"
        )
    return {"run": str(run), "other": str(other), "benchmarks": benchmarks, "heldout": heldout}


def _compare_scores(model: str, title: str, results: list[dict[str, Any] | None]) -> dict[str, Any]:
    first, second = results
    assert first and second, "both have a result"
    difference = subtract(first, second)
    paired = difference is not None
    if difference is None:  # other prompts, or another number of items
        value, errors = first["value"] - second["value"], [first["stderr"], second["stderr"]]
        stderr = None if None in errors else hypot(*errors)
        difference = {"value": value, "stderr": stderr, "verdict": compare_with_chance(value, stderr, 0.0)}
    return {
        "model": MODELS[model],
        "benchmark": title,
        "metric": first["metric"],
        "score": first["value"],
        "other": second["value"],
        "difference": difference,
        "paired": paired,
    }
