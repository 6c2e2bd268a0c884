"""The report's pictures: each function draws one matplotlib Figure and writes one PNG."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

BF16, INT4, REFERENCE, INK = "#1f5fa8", "#d9822b", "#8a8f98", "#22262b"
STYLE = {"linewidth": 1.6, "solid_capstyle": "round"}


def _make_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _style_axes(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c8ce")
    axes.tick_params(colors="#555b63", labelsize=8.5)
    axes.xaxis.label.set(size=9, color="#555b63")
    axes.yaxis.label.set(size=9, color="#555b63")


def draw_loss_curves(stages: list[dict], path: Path) -> None:
    """Draw one panel a stage: training loss, held-out loss, and the entropy of the unigram distribution as a line.

    A stage has title, metrics and heldout (lists of records with step and loss, nats a token) and unigram_entropy.
    """
    figure = _make_figure(11, 6)
    for axes, stage in zip(figure.subplots(2, 2).flat, stages, strict=True):
        _style_axes(axes, stage["title"])
        axes.set_xlabel("step")
        axes.set_ylabel("nats / token")
        if not stage["metrics"]:
            axes.text(0.5, 0.5, "not run yet", ha="center", va="center", color=REFERENCE, transform=axes.transAxes)
            continue
        axes.plot(*_get_series(stage["metrics"], "loss"), color=BF16, label="training", **STYLE)
        if stage["heldout"]:
            axes.plot(*_get_series(stage["heldout"], "loss"), color=INT4, marker="o", ms=4, label="held-out", **STYLE)
        if stage["unigram_entropy"] is not None:
            axes.axhline(stage["unigram_entropy"], color=REFERENCE, ls="--", lw=1.1, label="unigram entropy")
        axes.legend(frameon=False, fontsize=8.5)
        axes.grid(axis="y", color="#eceef1")
        axes.set_axisbelow(True)
    figure.savefig(path)


def _get_series(records: list[dict], key: str) -> tuple[list, list]:
    return [record["step"] for record in records], [record[key] for record in records]


def draw_expert_load(stages: list[dict], path: Path) -> None:
    """Draw a heat map of the latest load by layer and expert (1 = an even share), and the imbalance over all steps.

    A stage has title and expert_load: records with step and layers of load (share a routed expert) and max_over_mean.
    """
    stages = [stage for stage in stages if stage["expert_load"]]
    figure = _make_figure(11, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    last = stages[-1]["expert_load"][-1]
    load_LE = np.array([layer["load"] for layer in last["layers"]])
    load_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(load_LE.max())))
    image = left.imshow(load_LE, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=left, pad=0.02)
    bar.set_label("load / even share", fontsize=8.5, color="#555b63", labelpad=6)
    bar.ax.tick_params(labelsize=8, colors="#555b63")
    bar.outline.set_visible(False)
    _style_axes(left, f"Load of the routed experts, {stages[-1]['short']} step {last['step']}")
    left.set(xlabel="expert", ylabel="layer")
    left.yaxis.get_major_locator().set_params(integer=True)
    left.xaxis.get_major_locator().set_params(integer=True)

    before = 0
    for number, stage in enumerate(stages):
        steps = [before + record["step"] for record in stage["expert_load"]]
        ratios = [[layer["max_over_mean"] for layer in record["layers"]] for record in stage["expert_load"]]
        first = number == 0
        right.plot(steps, np.max(ratios, axis=1), color=INT4, label="worst layer" if first else None, **STYLE)
        right.plot(steps, np.mean(ratios, axis=1), color=BF16, label="mean of layers" if first else None, **STYLE)
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
    _style_axes(right, "Imbalance (1 = even)")
    figure.savefig(path)


def draw_benchmarks(rows: list[dict], path: Path) -> None:
    """Draw scores with two standard errors, beside the random-guess level and the published base model."""
    figure = _make_figure(11, 0.36 * len(rows) + 1.1)
    axes = figure.subplots()
    positions = np.arange(len(rows))[::-1]
    axes.hlines(positions, 0, 100, color="#eceef1", lw=0.8, zorder=0)
    chance = [100 * row["chance"] for row in rows]
    axes.scatter(chance, positions, marker="|", s=420, color=REFERENCE, linewidths=2, label="random guess", zorder=2)
    published = [
        (100 * row["published_base"], y) for row, y in zip(rows, positions, strict=True) if row["published_base"]
    ]
    if published:
        scores, places = zip(*published, strict=True)
        axes.scatter(scores, places, marker="D", s=26, facecolor="white", edgecolor=INK,
                     label="MobileMoE-S base, published", zorder=2)  # fmt: skip
    for model, colour, label, shift in (("sft_bf16", BF16, "SFT, BF16", 0.13), ("int4", INT4, "QAT, INT4", -0.13)):
        scored = [(row[model], y) for row, y in zip(rows, positions, strict=True) if row[model]]
        if scored:
            values = [100 * result["value"] for result, _ in scored]
            errors = [200 * (result["stderr"] or 0.0) for result, _ in scored]
            axes.errorbar(values, [y + shift for _, y in scored], xerr=errors, fmt="o", ms=5, color=colour,
                          elinewidth=1.4, label=f"{label}, ± 2 standard errors", zorder=3)  # fmt: skip
    axes.set_yticks(positions, [f"{row['title']}  ({row['shots']})" for row in rows])
    axes.set(xlim=(-2, 100), xlabel="score, percent (number of examples in the prompt in brackets)")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    _style_axes(axes, "Benchmarks")
    figure.savefig(path)
