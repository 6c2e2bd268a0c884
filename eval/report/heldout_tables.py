"""Held-out losses of a run's models: tables by domain, and differences on the same windows with their errors."""

import json
from math import sqrt
from pathlib import Path
from typing import Any

from eval.report.scores import MODELS, compare_with_chance

HELDOUT_SETS = {"text": "Held-out text", "sft": "Held-out conversations, the assistant's tokens"}
DIFFERENCES = {
    "rounding_cost": ("sft_int4_rounded", "sft"),
    "qat_cost": ("qat_int4", "sft"),
    "qat_against_rounding": ("qat_int4", "sft_int4_rounded"),
}
"""Name of a difference -> the two models."""


def read_heldout(run: Path) -> dict[str, dict[str, Any]]:
    """Return the content of eval/heldout.json, model -> set -> result; empty where it was not measured."""
    path = run / "eval/heldout.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def collect_heldout(run: Path) -> list[dict[str, Any]]:
    """Return the tables of text and of conversations: the models' losses, their domains, and what INT4 costs."""
    measured = read_heldout(run)
    return [
        _build_table(kind, title, {key: result[kind] for key, result in measured.items()})
        for kind, title in HELDOUT_SETS.items()
    ]


def _build_table(kind: str, title: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one of the two tables; `found`: model -> loss, tokens, by_domain."""
    return {
        "kind": kind,
        "title": title,
        "rows": [
            {"key": key, "title": model, "result": _drop_windows(found.get(key))} for key, model in MODELS.items()
        ],
        "domains": sorted({domain for result in found.values() for domain in result["by_domain"]}),
    } | {name: subtract_losses(found.get(after), found.get(before)) for name, (after, before) in DIFFERENCES.items()}


def _drop_windows(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a result without the losses of its windows, which the report has no room for."""
    if result is None:
        return None
    domains = {
        name: {key: value for key, value in domain.items() if key != "windows"}
        for name, domain in result["by_domain"].items()
    }
    return result | {"by_domain": domains}


def subtract_losses(after: dict[str, Any] | None, before: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the difference of two held-out losses, nats a token, and its standard error over windows of text.

    Tokens of one window are not independent of each other, so a window counts as one draw: the loss is a ratio of sums
    over windows. Where the windows are not the same in both, the error is unknown.

    Returns:
        `value`, `stderr` and `verdict` as in `scores.compare_with_chance` beside 0; None where a result is absent.
    """
    if not after or not before or after["loss"] is None or before["loss"] is None:
        return None
    value = after["loss"] - before["loss"]
    changes, tokens = [], []
    for name, domain in after["by_domain"].items():
        other = before["by_domain"].get(name, {})
        if domain.get("targets_sha256") is None or domain["targets_sha256"] != other.get("targets_sha256"):
            return {"value": value, "stderr": None, "verdict": None}
        changes += [x - y for (x, _), (y, _) in zip(domain["windows"], other["windows"], strict=True)]
        tokens += [n for _, n in domain["windows"]]
    if len(changes) < 2:
        return {"value": value, "stderr": None, "verdict": None}
    spread = sum((change - value * n) ** 2 for change, n in zip(changes, tokens, strict=True))
    stderr = sqrt(spread * len(changes) / (len(changes) - 1)) / sum(tokens)
    return {"value": value, "stderr": stderr, "verdict": compare_with_chance(value, stderr, 0.0)}
