"""The step `report`: the page about a run."""

from pathlib import Path

from pipelines.steps.context import Context


def write_report(context: Context) -> None:
    """Write tables, pictures and the page from what the run folder holds."""
    context.run_job("report", write_report_on_worker, (context.run,), cpus=1)


def write_report_on_worker(run: Path) -> None:
    """Write the report of a run folder; matplotlib and jinja2 are loaded in the worker."""
    from eval.report import run_report
    from pipelines.scaling.prediction import predict_run

    run_report.write_report(run, predict_run(run))
