"""The report's pictures of training: each function draws one matplotlib Figure and writes one PNG.

Every function takes `narrow`: whether the picture is for a phone.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from eval.report.drawing import (
    BLUE,
    COLOURS,
    LINE,
    MARKERS,
    NARROW,
    ORANGE,
    REFERENCE,
    SOFT,
    WIDE,
    make_figure,
    style_axes,
)


def draw_loss_curves(stages: list[dict], path: Path, *, narrow: bool) -> None:
    """Draw one panel a stage: training loss, held-out loss, and the entropy of the unigram distribution as a line.

    A stage has title, metrics and heldout (lists of records with step and loss, nats a token) and unigram_entropy.
    """
    figure = make_figure(NARROW, 11) if narrow else make_figure(WIDE, 6)
    panels = figure.subplots(4, 1) if narrow else figure.subplots(2, 2)
    for axes, stage in zip(panels.flat, stages, strict=True):
        style_axes(axes, stage["title"], grid="y")
        axes.set_xlabel("step")
        axes.set_ylabel("nats / token")
        if not stage["metrics"]:
            axes.text(0.5, 0.5, "not run yet", ha="center", va="center", color=REFERENCE, transform=axes.transAxes)
            continue
        axes.plot(*_get_series(stage["metrics"], "loss"), color=BLUE, label="training", **LINE)
        if stage["heldout"]:
            axes.plot(*_get_series(stage["heldout"], "loss"), color=ORANGE, marker="o", ms=4, label="held-out", **LINE)
        if stage["unigram_entropy"] is not None:
            axes.axhline(stage["unigram_entropy"], color=REFERENCE, ls="--", lw=1.1, label="unigram entropy")
        axes.legend(frameon=False, fontsize=8.5)
    figure.savefig(path)


def _get_series(records: list[dict], key: str) -> tuple[list, list]:
    return [record["step"] for record in records], [record[key] for record in records]


def draw_quick_suite(stages: list[dict], path: Path, *, narrow: bool) -> None:
    """Draw the benchmarks that were scored while the stages trained, with two standard errors, over all steps.

    A stage has short, metrics and benchmarks: records with step and benchmark -> value, stderr (fractions).
    """
    figure = make_figure(NARROW if narrow else WIDE, 3.6)
    axes = figure.subplots()
    names = sorted({name for stage in stages for record in stage["benchmarks"] for name in record["benchmarks"]})
    before = 0
    for stage in stages:
        for number, name in enumerate(names):
            records = [record for record in stage["benchmarks"] if name in record["benchmarks"]]
            steps = [before + record["step"] for record in records]
            values = [100 * record["benchmarks"][name]["value"] for record in records]
            errors = [200 * (record["benchmarks"][name]["stderr"] or 0.0) for record in records]
            label = name if stage is next(s for s in stages if s["benchmarks"]) else None
            axes.errorbar(
                steps, values, yerr=errors, marker=MARKERS[number % 5], ms=4, color=COLOURS[number % 5], elinewidth=0.8,
                label=label, **LINE,
            )  # fmt: skip
        if stage["metrics"]:
            axes.annotate(
                stage["short"], (before, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
                textcoords="offset points", va="top", fontsize=8, color=REFERENCE,
            )  # fmt: skip
            before += stage["metrics"][-1]["step"]
    axes.set(xlabel="step, all stages", ylabel="score, percent")
    axes.legend(frameon=False, fontsize=8.5)
    style_axes(axes, "Benchmarks while training, ± 2 standard errors", grid="y")
    figure.savefig(path)


def draw_expert_load(stages: list[dict], path: Path, *, narrow: bool) -> None:
    """Draw a heat map of the latest load by layer and expert (1 = an even share), and the imbalance over all steps.

    A stage has short, expert_load (records with step and layers of max_over_mean) and last_load (step and layers of
    shares a routed expert).
    """
    stages = [stage for stage in stages if stage["last_load"]]
    figure = make_figure(NARROW, 6.4) if narrow else make_figure(WIDE, 3.6)
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, width_ratios=[1.25, 1])
    last = stages[-1]["last_load"]
    title = f"Load of the experts, {stages[-1]['short']} step {last['step']}"
    _add_bar(figure, [left], _draw_load(left, np.array(last["layers"]), title))

    before = 0
    for number, stage in enumerate(stages):
        steps = [before + record["step"] for record in stage["expert_load"]]
        ratios = [[layer["max_over_mean"] for layer in record["layers"]] for record in stage["expert_load"]]
        first = number == 0
        right.plot(steps, np.max(ratios, axis=1), color=ORANGE, label="worst layer" if first else None, **LINE)
        right.plot(steps, np.mean(ratios, axis=1), color=BLUE, label="mean of layers" if first else None, **LINE)
        if before:
            right.axvline(before, color="#dfe2e6", lw=1)
        right.annotate(
            stage["short"], (before, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
            textcoords="offset points", va="top", fontsize=8, color=REFERENCE,
        )  # fmt: skip
        before = steps[-1]
    right.axhline(1.0, color=REFERENCE, ls="--", lw=1)
    right.set(xlabel="step, all stages", ylabel="largest / mean load")
    right.legend(frameon=False, fontsize=8.5)
    style_axes(right, "Imbalance (1 = even)")
    figure.savefig(path)


def draw_domain_load(by_domain: dict[str, list[list[float]]], path: Path, *, narrow: bool) -> None:
    """Draw which experts the tokens of each held-out domain take: a heat map a domain, all on one scale.

    Args:
        by_domain: domain -> layers of shares a routed expert.
    """
    columns = 1 if narrow else min(3, len(by_domain))
    rows = -(-len(by_domain) // columns)
    figure = make_figure(NARROW if narrow else WIDE, 2.5 * rows + 0.3)
    panels = figure.subplots(rows, columns, squeeze=False)
    loads = {domain: np.array(load) for domain, load in by_domain.items()}
    highest = max(float((load_LE * load_LE.shape[1]).max()) for load_LE in loads.values())
    for axes, (domain, load_LE) in zip(panels.flat, loads.items(), strict=False):
        image = _draw_load(axes, load_LE, domain, highest)
    for axes in panels.flat[len(loads) :]:
        axes.set_axis_off()
    _add_bar(figure, list(panels.flat), image)
    figure.savefig(path)


def _draw_load(axes: Axes, load_LE: np.ndarray, title: str, highest: float = 0.0) -> AxesImage:
    """Draw shares [layer, expert] over an even share: white is even, blue less, red more."""
    even_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(even_LE.max()), highest))
    image = axes.imshow(even_LE, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    # A name of a domain is a text of the user's: no formulas in it.
    style_axes(axes, title.replace("$", r"\$"))
    axes.set(xlabel="expert", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


def _add_bar(figure: Figure, panels: list[Axes], image: AxesImage) -> None:
    bar = figure.colorbar(image, ax=panels, pad=0.02)
    bar.set_label("load / even share", fontsize=8.5, color=SOFT, labelpad=6)
    bar.ax.tick_params(labelsize=8, colors=SOFT)
    bar.outline.set_visible(False)
