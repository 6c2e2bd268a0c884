"""The report of a run: `write_report` collects the results, draws the figures and renders the pages."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core.atomic import atomic_write, remove, write_json
from core.errors import RefusedInput
from core.printable import make_line, make_printable
from eval.report import figures
from eval.report.collect import MODELS, collect_results, collect_stages

_MARKUP = re.compile(r"[\\`*_\[\]<>#|~&$@:]")
"""Characters that Markdown, or an extension of it, may read as markup."""


def write_report(run: Path, scaling_law: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `run/report/` (report.md, report.html, results.json, PNGs) from what the run folder holds.

    An unfinished run gets a report of what there is. An older report is replaced as a whole.

    Args:
        scaling_law: what a scaling law predicts for the run (`pipelines.scaling.prediction`), with its `text`.

    Returns:
        The content of results.json.

    Raises:
        RefusedInput: `run` is no folder.
    """
    if not run.is_dir():
        raise RefusedInput(f"report: {run} is not a run folder; give the folder that `mobilemoe run --out` named")
    stages = collect_stages(run)
    results = collect_results(run, stages) | {"scaling_law": scaling_law}
    with atomic_write(run / "report") as partial:
        partial.mkdir()
        pictures = _draw_figures(results, stages, partial)
        _render_pages(results, pictures, partial)
        write_json(partial / "results.json", results)
        remove(run / "report")
    return results


def _draw_figures(results: dict, stages: list[dict], folder: Path) -> dict[str, str]:
    """Write the figures that have something to show, and return their file names by figure."""
    drawn = {}
    if any(stage["metrics"] for stage in stages):
        figures.draw_loss_curves(stages, folder / "loss.png")
        drawn["loss"] = "loss.png"
    if any(stage["expert_load"] for stage in stages):
        figures.draw_expert_load(stages, folder / "expert_load.png")
        drawn["expert_load"] = "expert_load.png"
    if any(row[model] for row in results["benchmarks"] for model in MODELS):
        figures.draw_benchmarks(results["benchmarks"], folder / "benchmarks.png")
        drawn["benchmarks"] = "benchmarks.png"
    return drawn


def _render_pages(results: dict, pictures: dict[str, str], folder: Path) -> None:
    """Write report.html, which embeds its pictures, and report.md, which links them."""
    embedded = {
        name: "data:image/png;base64," + base64.b64encode((folder / file).read_bytes()).decode()
        for name, file in pictures.items()
    }
    environment = _make_environment()
    for template, images in (("report.html.j2", embedded), ("report.md.j2", pictures)):
        text = make_printable(environment.get_template(template).render(**results, images=images, models=MODELS))
        (folder / template.removesuffix(".j2")).write_text(text, encoding="utf-8")


def _make_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "text": _escape_markdown,
        "code": _quote_code,
        "percent": _make_filter("{:.1f}", 100),
        "points": _make_filter("{:+.1f}", 100),
        "nats": _make_filter("{:.4f}"),
        "change": _make_filter("{:+.4f}"),
        "count": _make_filter("{:,.0f}"),
        "ratio": _make_filter("{:.2f}"),
        "bytes": _format_bytes,
        "duration": _format_duration,
    }
    return environment


def _escape_markdown(text: str) -> str:
    """Return a text as Markdown that shows it as it is, in one line."""
    return _MARKUP.sub(r"\\\g<0>", make_line(text))


def _quote_code(text: str) -> str:
    """Return a text as a code span of a Markdown table, in one line.

    The fence is longer than every run of backticks in the text, and only `|` is escaped: it would end the cell.
    """
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{make_line(text)}{space}{fence}".replace("|", r"\|")


def _make_filter(template: str, scale: float = 1.0) -> Callable[[float | None], str]:
    """Return a jinja filter that prints a number times `scale`, and a dash for None."""
    return lambda value: "–" if value is None else template.format(scale * value)


def _format_bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
