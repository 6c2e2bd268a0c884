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
from eval.report import data_figures, score_figures, training_figures
from eval.report.card import ARTIFACTS, build_lm_eval_results, build_model_index
from eval.report.collect import collect_results, collect_stages
from eval.report.scores import MODELS, PAIRS

_MARKUP = re.compile(r"[\\`*_\[\]<>#|~&$@:]")
"""Characters that Markdown, or an extension of it, may read as markup."""


def write_report(run: Path, scaling_law: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `run/report/` (report.md, report.html, results.json, PNGs, scores for model cards) from the run folder.

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
        _write_cards(results, partial)
        remove(run / "report")
    return results


def _write_cards(results: dict[str, Any], folder: Path) -> None:
    """Write `model_index_<artifact>.md` and `lm_eval_<artifact>.json` for the artifacts that were scored."""
    for model, artifact in ARTIFACTS.items():
        if any(row["scores"][model] for row in results["benchmarks"]):
            header = make_printable(build_model_index(results, model))
            (folder / f"model_index_{artifact}.md").write_text(header, encoding="utf-8")
            write_json(folder / f"lm_eval_{artifact}.json", build_lm_eval_results(results, model))


def _draw_figures(results: dict, stages: list[dict], folder: Path) -> dict[str, dict[str, str]]:
    """Write the figures that have something to show, for a desk and for a phone.

    Returns:
        figure -> {"wide": file name, "narrow": file name}
    """
    final = results["heldout"][0]["rows"][-1]["result"] or {"by_domain": {}}
    loads = {name: domain["expert_load"] for name, domain in final["by_domain"].items() if domain.get("expert_load")}
    scored = any(result for row in results["benchmarks"] for result in row["scores"].values())
    average = results["averages"]["qat_int4"]
    own = [results["model"] | average | {"title": "this run, QAT"}] if results["model"] and average else []
    draw: dict[str, tuple[bool, Callable[..., None], tuple[Any, ...]]] = {
        "composition": (
            any(row["split"] == "shards" for row in results["data"]["rows"]), data_figures.draw_composition,
            (results["data"]["rows"],),
        ),
        "loss": (any(s["metrics"] for s in stages), training_figures.draw_loss_curves, (stages,)),
        "quick_suite": (any(s["benchmarks"] for s in stages), training_figures.draw_quick_suite, (stages,)),
        "expert_load": (any(s["last_load"] for s in stages), training_figures.draw_expert_load, (stages,)),
        "domain_load": (bool(loads), training_figures.draw_domain_load, (loads,)),
        "benchmarks": (scored, score_figures.draw_benchmarks, (results["benchmarks"],)),
        "categories": (scored, score_figures.draw_categories, (results["categories"],)),
        "pareto": (
            bool(own) and results["suite"] == "foundational", score_figures.draw_pareto,
            (results["published_models"], own),
        ),
    }  # fmt: skip
    drawn = {}
    for name, (is_due, function, arguments) in draw.items():
        if is_due:
            drawn[name] = {"wide": f"{name}.png", "narrow": f"{name}_narrow.png"}
            for form, file in drawn[name].items():
                function(*arguments, folder / file, narrow=form == "narrow")
    return drawn


def _render_pages(results: dict, pictures: dict[str, dict[str, str]], folder: Path) -> None:
    """Write report.html, which embeds its pictures, and report.md, which links those for a desk."""
    embedded = {name: {form: _embed(folder / file) for form, file in files.items()} for name, files in pictures.items()}
    linked = {name: files["wide"] for name, files in pictures.items()}
    environment = _make_environment()
    for template, images in (("report.html.j2", embedded), ("report.md.j2", linked)):
        text = make_printable(
            environment.get_template(template).render(**results, images=images, models=MODELS, pairs=PAIRS)
        )
        (folder / template.removesuffix(".j2")).write_text(text, encoding="utf-8")


def _embed(file: Path) -> str:
    """Return a PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


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
        "difference": _format_difference,
        "count": _make_filter("{:,.0f}"),
        "ratio": _make_filter("{:.2f}"),
        "milliseconds": _make_filter("{:,.1f}", 1000),
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


def _format_difference(difference: dict[str, Any] | None) -> str:
    """Return a difference of losses with its standard error, and a dash for None."""
    if difference is None:
        return "–"
    stderr = "" if difference["stderr"] is None else f" ± {difference['stderr']:.4f}"
    return f"{difference['value']:+.4f}{stderr}"


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
