"""Benchmark scores of a run's models: beside chance, beside each other on the same items, and averaged."""

import json
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from core.errors import report_damage
from eval.benchmarks.suites import Benchmark

MODELS = {
    "pretrain": "PT",
    "midtrain": "MT",
    "sft": "SFT",
    "sft_int4_rounded": "SFT rounded to INT4",
    "qat_int4": "QAT, INT4",
}
"""Models that the benchmarks score: folder below `eval/`, and key in eval/heldout.json -> title."""
PAIRS = {
    "midtrain": ("midtrain", "pretrain", "MT − PT"),
    "sft": ("sft", "midtrain", "SFT − MT"),
    "rounding": ("sft_int4_rounded", "sft", "rounded − SFT"),
    "qat": ("qat_int4", "sft", "QAT − SFT"),
}
"""Name of a difference -> the two models, and its title."""
CHANCE_ERRORS = 2
"""Number of standard errors: a score at most this far from the chance level is at chance, and a difference at
most this large is none that can be seen."""


def collect_benchmarks(run: Path, suite: tuple[Benchmark, ...]) -> list[dict[str, Any]]:
    """Return one row a benchmark: description, `n_items`, `scores` (model -> result, None: not run), `differences`.

    A result has a `verdict` beside chance. A difference is that of two models on the same items.
    """
    rows = []
    for benchmark in suite:
        found = {model: read_result(run / "eval" / model / f"{benchmark.key}.json") for model in MODELS}
        differences = {name: subtract(found[after], found[before]) for name, (after, before, _) in PAIRS.items()}
        present = [result for result in found.values() if result]
        # A larger benchmark may have taken the place of the suite's.
        own = {key: present[0][key] for key in ("shots", "note") if present and key in present[0]}
        rows.append(
            benchmark.describe()
            | own
            | {
                "n_items": max((result["items"] for result in present), default=None),
                "scores": {model: _drop_values(result) for model, result in found.items()},
                "differences": differences,
            }
        )
    return rows


def _drop_values(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a result without its items' values, which the report has no room for."""
    return {key: value for key, value in result.items() if key != "values"} if result else None


def read_result(path: Path) -> dict[str, Any] | None:
    """Return a benchmark's result with its `verdict`, None where there is no file.

    Raises:
        DamagedData: it is no result of ours; names the file.
    """
    if not path.exists():
        return None
    with report_damage(path, "remove it, and the evaluation scores the benchmark again"):
        result = {**json.loads(path.read_text(encoding="utf-8"))}
        return result | {"verdict": compare_with_chance(result["value"], result["stderr"], result["chance"])}


def compare_with_chance(value: float, stderr: float | None, chance: float) -> str | None:
    """Return `chance` for a score within two standard errors of the chance level, else `above` or `below`.

    None stands for a score whose standard error is not known.
    """
    if stderr is None:
        return None
    if abs(value - chance) <= CHANCE_ERRORS * stderr:
        return "chance"
    return "above" if value > chance else "below"


def subtract(after: dict[str, Any] | None, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the mean difference of two results over their items, and its standard error from the items' differences.

    An item that both models find easy adds nothing to the error, so it is smaller than that of two separate scores.
    None where a result is absent, or where their prompts are not the same.
    """
    if not after or not before or after["prompts_sha256"] != before["prompts_sha256"]:
        return None
    if "values" not in after or "values" not in before:  # of an earlier version of this program
        return None
    changes = [x - y for x, y in zip(after["values"], before["values"], strict=True)]
    if len(changes) < 2:
        return {"value": fmean(changes), "stderr": None, "verdict": None}
    value, stderr = fmean(changes), stdev(changes) / sqrt(len(changes))
    return {"value": value, "stderr": stderr, "verdict": compare_with_chance(value, stderr, 0.0)}


def average(results: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the mean of scores or differences, each of other items, with its standard error; None if one is absent."""
    present = [result for result in results if result]
    if not present or len(present) < len(results):
        return None
    errors = [result["stderr"] for result in present]
    stderr = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
    return {"value": fmean(result["value"] for result in present), "stderr": stderr}


def average_scores(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Return the mean over the rows of each model, None unless it has a result in all of them."""
    return {model: average([row["scores"][model] for row in rows]) for model in MODELS}


def average_differences(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Return the mean over the rows of each difference, None unless all of them have it."""
    return {name: average([row["differences"][name] for row in rows]) for name in PAIRS}


def average_categories(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any] | None]]:
    """Return category -> model -> mean score over the category's benchmarks."""
    categories = dict.fromkeys(row["category"] for row in rows)
    return {category: average_scores([row for row in rows if row["category"] == category]) for category in categories}


def describe_chance(rows: list[dict[str, Any]], model: str) -> str:
    """Return a sentence that says how many of a model's scores can be told from a guess."""
    results = {row["title"]: row["scores"][model] for row in rows}
    judged = {title: result["verdict"] for title, result in results.items() if result and result["verdict"]}
    if not judged:
        return f"{MODELS[model]}: no benchmark has been scored yet."
    groups = {kind: [title for title, v in judged.items() if v == kind] for kind in ("chance", "above", "below")}
    sentence = (
        f"{MODELS[model]}: {len(groups['chance'])} of {len(judged)} scores lie within two standard errors of the "
        "chance level"
    )
    for kind in ("above", "below"):
        if groups[kind]:
            sentence += f"; {kind} it: {', '.join(groups[kind])}"
    return sentence + "."


def is_mostly_chance(rows: list[dict[str, Any]]) -> bool:
    """Return whether most scores of all models together are at chance."""
    verdicts = [result["verdict"] for row in rows for result in row["scores"].values() if result and result["verdict"]]
    return 2 * verdicts.count("chance") > len(verdicts)


def list_truncated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the benchmarks of which prompts were cut: `title`, `prompts` (the most of a model), `items`, `models`."""
    found = []
    for row in rows:
        cut = {model: result for model, result in row["scores"].items() if result and result["truncated"]}
        if cut:
            found.append(
                {
                    "title": row["title"],
                    "prompts": max(result["truncated"] for result in cut.values()),
                    "items": row["n_items"],
                    "models": [MODELS[model] for model in cut],
                }
            )
    return found
