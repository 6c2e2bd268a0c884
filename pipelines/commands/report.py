"""`mobilemoe report`: the report of a run again, without the run."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from pipelines.commands import inputs
from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Report:
    """Write the report of a run again, from what is there."""

    run: tyro.conf.Positional[Path]
    law: Path | None = None
    """law.json of `scaling-law fit` or `sweep`, whose prediction the report shows; the published law if not given."""
    json: bool = False
    """One JSON object on stdout."""


def rewrite_report(arguments: Report) -> None:
    """Write the report of a run folder, whatever is missing in it.

    Raises:
        RefusedInput: the folder holds no run, or nothing can be written to it.
    """
    inputs.require_run_folder(arguments.run)
    if arguments.law is not None:
        inputs.require_file("--law", arguments.law)
    inputs.require_output_folder("RUN", arguments.run / "report")
    from eval.report.run_report import write_report
    from pipelines.scaling.law import PUBLISHED, load_law
    from pipelines.scaling.prediction import predict_run

    law = PUBLISHED if arguments.law is None else load_law(arguments.law)
    results = write_report(arguments.run, predict_run(arguments.run, law))
    emit_result(arguments.json, results, lambda: f"report written to {arguments.run / 'report'}")
