"""`mobilemoe report`: the report of a run again, without the run; or two runs beside each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Group, RenderableType
from rich.table import Table

from core.errors import RefusedInput
from pipelines.commands import inputs
from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Report:
    """Write the report of a run again, from what is there, or compare two runs."""

    run: tyro.conf.Positional[Path]
    compare: Path | None = None
    """Another run. Nothing is written: scores and losses of both are printed, as RUN minus the other, and what is
    beyond two standard errors is marked."""
    law: Path | None = None
    """law.json of `scaling-law fit` or `sweep`, whose prediction the report shows; the published law if not given."""
    json: bool = False
    """One JSON object on stdout."""


def rewrite_report(arguments: Report) -> None:
    """Write the report of a run folder, whatever is missing in it, or print how it compares with another.

    Raises:
        RefusedInput: a folder holds no run, nothing can be written to it, or the two runs have nothing in common.
    """
    inputs.require_run_folder(arguments.run)
    if arguments.compare is not None:
        if arguments.law is not None:
            raise RefusedInput("--law: is an option of the report; leave it out beside --compare")
        inputs.require_run_folder(arguments.compare)
        from eval.report.compare import compare_runs

        found = compare_runs(arguments.run, arguments.compare)
        emit_result(arguments.json, found, lambda: format_comparison(found))
        return
    if arguments.law is not None:
        inputs.require_file("--law", arguments.law)
    inputs.require_output_folder("RUN", arguments.run / "report")
    from eval.report.run_report import write_report
    from pipelines.scaling.law import PUBLISHED, load_law
    from pipelines.scaling.prediction import predict_run

    law = PUBLISHED if arguments.law is None else load_law(arguments.law)
    results = write_report(arguments.run, predict_run(arguments.run, law))
    emit_result(arguments.json, results, lambda: f"report written to {arguments.run / 'report'}")


MARKS = {"above": "▲", "below": "▼", "chance": "", None: "?"}
"""Mark of a difference by its verdict."""


def format_comparison(found: dict[str, Any]) -> RenderableType:
    """Return two runs beside each other as tables."""
    scores, losses = Table(), Table()
    for column in ("model", "benchmark", "run", "other", "difference, points", ""):
        scores.add_column(column, justify="left" if column in ("model", "benchmark", "") else "right")
    for row in found["benchmarks"]:
        unpaired = "" if row["paired"] else "other items"
        scores.add_row(
            row["model"], row["benchmark"], f"{100 * row['score']:.1f}", f"{100 * row['other']:.1f}",
            _format_change(row["difference"], 100, ".1f"), f"{MARKS[row['difference']['verdict']]} {unpaired}".strip(),
        )  # fmt: skip
    for column in ("model", "held-out", "run", "other", "difference, nats", ""):
        losses.add_column(column, justify="left" if column in ("model", "held-out", "") else "right")
    for row in found["heldout"]:
        difference = row["difference"] or {"value": float("nan"), "stderr": None, "verdict": None}
        losses.add_row(
            row["model"], row["set"], f"{row['loss']:.4f}", f"{row['other']:.4f}",
            _format_change(difference, 1, ".4f"), MARKS[difference["verdict"]],
        )  # fmt: skip
    seen = [row for row in found["benchmarks"] + found["heldout"] if row["difference"]]
    beyond = sum(row["difference"]["verdict"] in ("above", "below") for row in seen)
    note = (
        f"{beyond} of {len(seen)} differences are beyond two standard errors (▲ RUN is higher, ▼ lower). One in twenty "
        "is so by chance. ?: the error is unknown."
    )
    return Group(f"{found['run']} beside {found['other']}", scores, losses, note)


def _format_change(difference: dict[str, Any], scale: float, spec: str) -> str:
    stderr = "" if difference["stderr"] is None else f" ± {scale * difference['stderr']:{spec}}"
    return f"{scale * difference['value']:+{spec}}{stderr}"
