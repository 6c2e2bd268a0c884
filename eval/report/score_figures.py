"""The report's pictures of scores: each function draws one matplotlib Figure and writes one PNG.

Every function takes `narrow`: whether the picture is for a phone. Scores are fractions, and percent in the pictures.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from eval.report.drawing import (
    BLUE,
    COLOURS,
    GREEN,
    INK,
    LINE,
    MARKERS,
    NARROW,
    ORANGE,
    REFERENCE,
    SKY,
    SOFT,
    WIDE,
    make_figure,
    style_axes,
)
from eval.report.scores import MODELS

LABEL_POINTS = 3.6
"""Distance of two names beside a picture of averages, in points of the score."""
SHOWN = {"pretrain": SKY, "sft": BLUE, "sft_int4_rounded": GREEN, "qat_int4": ORANGE}
"""Models in the picture of the benchmarks -> colour."""


def draw_benchmarks(rows: list[dict], path: Path, *, narrow: bool) -> None:
    """Draw scores with two standard errors, beside the chance level and the published base model."""
    figure = make_figure(NARROW if narrow else WIDE, 0.5 * len(rows) + (1.9 if narrow else 1.3))
    axes = figure.subplots()
    positions = np.arange(len(rows))[::-1]
    for y in positions[::2]:
        axes.axhspan(y - 0.5, y + 0.5, color="#f6f7f9", zorder=0)
    chance = [100 * row["chance"] for row in rows]
    axes.scatter(chance, positions, marker="|", s=420, color=REFERENCE, linewidths=2, label="chance", zorder=2)
    published = [
        (100 * row["published_base"], y) for row, y in zip(rows, positions, strict=True) if row["published_base"]
    ]
    if published:
        found, places = zip(*published, strict=True)
        axes.scatter(found, places, marker="*", s=60, facecolor="white", edgecolor=INK,
                     label="MobileMoE-S base, published", zorder=2)  # fmt: skip
    for number, (model, colour) in enumerate(SHOWN.items()):
        shift = 0.27 - 0.18 * number
        scored = [(row["scores"][model], y) for row, y in zip(rows, positions, strict=True) if row["scores"][model]]
        if scored:
            values = [100 * result["value"] for result, _ in scored]
            errors = [200 * (result["stderr"] or 0.0) for result, _ in scored]
            axes.errorbar(values, [y + shift for _, y in scored], xerr=errors, fmt=MARKERS[number], ms=4, color=colour,
                          elinewidth=1.2, label=MODELS[model], zorder=3)  # fmt: skip
    axes.set_yticks(positions, [f"{row['title']}  ({row['shots']})" for row in rows])
    axes.set(xlim=(-2, 100), ylim=(-0.5, len(rows) - 0.5), xlabel="score, percent (examples in the prompt in brackets)")
    figure.legend(
        *axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower left",
        ncols=2 if narrow else 6, title="bars: ± 2 standard errors", title_fontsize=8.5, alignment="left",
    )  # fmt: skip
    style_axes(axes, "Benchmarks")
    figure.savefig(path)


def draw_categories(categories: dict[str, dict[str, dict | None]], path: Path, *, narrow: bool) -> None:
    """Draw the mean score of every category after each stage, with two standard errors."""
    figure = make_figure(NARROW if narrow else WIDE, 4.0)
    axes = figure.subplots()
    labels = [title.replace(" rounded to", "\nrounded to").replace(", ", "\n") for title in MODELS.values()]
    for number, (category, found) in enumerate(categories.items()):
        points = [(x, mean) for x, model in enumerate(MODELS) if (mean := found[model])]
        if not points:
            continue
        # Side by side, so that no bar hides another.
        places = [x + 0.06 * (number - (len(categories) - 1) / 2) for x, _ in points]
        values = [100 * point["value"] for _, point in points]
        errors = [200 * (point["stderr"] or 0.0) for _, point in points]
        style: dict[str, Any] = {"color": COLOURS[number % 5], "marker": MARKERS[number % 5], "ms": 5}
        axes.errorbar(places, values, yerr=errors, elinewidth=1.0, label=category, **style, **LINE)
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="mean score, percent", ylim=(0, None))
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8.5, loc="outside lower left",
                  ncols=3 if narrow else 5)  # fmt: skip
    style_axes(axes, "Capability after each stage, ± 2 standard errors", grid="y")
    figure.savefig(path)


def draw_pareto(published: list[dict], own: list[dict], path: Path, *, narrow: bool) -> None:
    """Draw average scores against active parameters and against INT4 bytes, published models as labelled points.

    Args:
        published: title, active, int4_bytes and base (percent) of every model.
        own: title, active, int4_bytes, value and stderr (fractions) of this run's models.
    """
    figure = make_figure(NARROW, 8.0) if narrow else make_figure(WIDE, 4.2)
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for axes, key, unit, title, label in (
        (left, "active", 1e9, "Score against computation", "active parameters, billions"),
        (right, "int4_bytes", 1e9, "Score against memory", "bytes of INT4 weights (4.5 bits a parameter), GB"),
    ):
        axes.set_xscale("log")
        _scatter(axes, [(m[key] / unit, m["base"], m["title"]) for m in published], own, key, unit)
        axes.set(xlabel=label, ylabel="average of the 14, percent", ylim=(0, 70))
        style_axes(axes, title, grid="both")
    figure.savefig(path)


def _scatter(axes: Axes, published: list[tuple[float, float, str]], own: list[dict], key: str, unit: float) -> None:
    """Draw the points, and their names in a column on the right, with a thin line from each to its point."""
    points = [(x, y, title, BLUE if title.startswith("MobileMoE") else SOFT) for x, y, title in published]
    for x, y, title, colour in points:
        axes.scatter(x, y, s=34, marker="o" if title.startswith("MobileMoE") else "s", color=colour, zorder=3)
    for model in own:
        x, y = model[key] / unit, 100 * model["value"]
        axes.errorbar(x, y, yerr=200 * (model["stderr"] or 0.0), fmt="*", ms=11, color=ORANGE, zorder=4)
        points.append((x, y, model["title"], ORANGE))
    lowest = -np.inf
    for x, y, title, colour in sorted(points, key=lambda point: point[1]):
        lowest = max(y, lowest + LABEL_POINTS)
        axes.annotate(
            title, (x, y), xytext=(1.03, lowest), textcoords=axes.get_yaxis_transform(), va="center", fontsize=8,
            color=colour, annotation_clip=False, arrowprops={"arrowstyle": "-", "color": "#d3d7dc", "lw": 0.7},
        )  # fmt: skip
