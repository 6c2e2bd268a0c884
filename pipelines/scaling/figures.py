"""The pictures of the scaling law: each function draws one matplotlib Figure and writes one file.

Colours are those of Okabe and Ito, which colour-blind readers tell apart, and every line also has a marker of its own,
for print without colour.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.export.sizes import int4_bytes
from eval.report.drawing import INK, SOFT, style_axes
from pipelines.scaling.fit import Fit
from pipelines.scaling.law import Law
from pipelines.scaling.points import SCALE_TOLERANCE, Point, group_scales
from pipelines.scaling.solve import EXPERTS, Budget, Candidate, list_candidates
from titan_ext.config import FLAVORS
from titan_ext.model_stats import count_parameters, kv_cache_bytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
CONTEXT = 8192
"""Positions of the KV cache, of 8 bits a value, in pictures with a memory."""
MEMORIES = (0.5e9, 1e9, 2e9, 3e9, 5e9, 8e9)
MIDDLE_COMPUTE = 9e20
"""Training FLOPs of the trade-offs: 6 x 0.5B x 300B tokens, the middle of the published sweep."""
MARKED_TOKENS = 300e9
"""Training tokens at which S, M and L are marked."""
SHOWN_LOSS = 0.2
"""Nats above the least loss that the trade-offs show."""


def draw_law(law: Law, sizes: Sequence[float], tokens: Sequence[float], points: Sequence[Point], folder: Path) -> None:
    """Draw experts.png, tradeoffs.png and solutions.png, the last with S, M and L at 300B tokens.

    Args:
        sizes, tokens: of the curves and the panels of experts.png; at most six sizes are drawn, and four lengths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_experts(law, sizes[: len(COLOURS)], tokens[:4], points, folder / "experts.png")
    draw_tradeoffs(law, MEMORIES, MIDDLE_COMPUTE, folder / "tradeoffs.png")
    marked: dict[str, tuple[float, float]] = {}
    for name in ("S", "M", "L"):
        dims = FLAVORS[name]
        memory = int4_bytes(dims) + kv_cache_bytes(dims, CONTEXT, 1)
        marked[name] = (memory, 6 * count_parameters(dims).active * MARKED_TOKENS)
    draw_solutions(law, marked, folder / "solutions.png")


def draw_fit(fit: Fit, folder: Path) -> None:
    """Draw the pictures of a fitted law with its points, and residuals.png."""
    sizes, tokens = (
        [float(np.mean(scale)) for scale in group_scales(getattr(point, name) for point in fit.points)]
        for name in ("active", "tokens")
    )
    draw_law(fit.law, sizes, tokens, fit.points, folder)
    draw_residuals(fit.points, fit.residuals, folder / "residuals.png")


def draw_experts(
    law: Law, sizes: Sequence[float], tokens: Sequence[float], points: Sequence[Point], path: Path
) -> None:
    """Draw the loss against the number of experts: a panel for each number of tokens, a curve for each size.

    Args:
        points: measured points, which are drawn where a panel and a curve have their tokens and size.
    """
    figure = Figure(figsize=(3.6 * len(tokens), 3.6), dpi=150, layout="constrained")
    shown = [experts for experts in EXPERTS if law.experts.low <= experts <= law.experts.high]
    grid = np.geomspace(law.experts.low, law.experts.high, 60)
    for axes, length in zip(figure.subplots(1, len(tokens), sharey=True, squeeze=False).flat, tokens, strict=True):
        for number, size in enumerate(sizes):
            label = f"{format_count(size)} active"
            axes.plot(grid, law.coefficients.predict_loss(size, length, grid), color=COLOURS[number], lw=1.5)
            marks = law.coefficients.predict_loss(size, length, np.array(shown))
            axes.plot(shown, marks, MARKERS[number], color=COLOURS[number], ms=4, label=label)
            found = [(p.experts, p.loss) for p in points if _is_near(p.active, size) and p.tokens == length]
            if found:
                colour = COLOURS[number]
                axes.plot(*zip(*found, strict=True), MARKERS[number], mfc="white", mec=colour, mew=1.8, ms=8, zorder=3)
        style_axes(axes, f"{format_count(length)} tokens", grid="both")
        axes.set(xscale="log", xlabel="coarse experts E")
        set_ticks(axes, shown)
    figure.axes[0].set_ylabel("loss, nats a token" if points else "predicted loss, nats a token")
    if points:
        figure.axes[0].plot([], [], "o", mfc="white", mec=INK, mew=1.8, ms=8, label="open: measured")
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _is_near(value: float, size: float) -> bool:
    """Return whether a model counts as of this size: its router's parameters change the number a little."""
    return size / SCALE_TOLERANCE < value < size * SCALE_TOLERANCE


def draw_tradeoffs(law: Law, memories: Sequence[float], compute: float, path: Path) -> None:
    """Draw the loss of real models at equal training compute: by active parameters, and the least within a memory."""
    figure = Figure(figsize=(10.5, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    budget = Budget(memory=max(memories) * 2, context=CONTEXT, train_flops=compute)
    candidates = list(list_candidates(budget, EXPERTS, granularity=8, shared=True))
    for number, experts in enumerate(EXPERTS):
        models = sorted((c for c in candidates if c.experts == experts), key=lambda c: c.count.active)
        losses = [model.predict_loss(law) for model in models]
        style = {"color": COLOURS[number], "lw": 1.4, "marker": MARKERS[number], "ms": 3.5, "markevery": 4}
        left.plot([m.count.active for m in models], losses, label=f"E = {experts}", **style)
        right.plot(*_keep_best(models, losses), label=f"E = {experts}", **style)
    least = min(candidate.predict_loss(law) for candidate in candidates)
    style_axes(left, f"Equal training compute, {compute:.0e} FLOPs", grid="both")
    left.set(xscale="log", xlabel="active parameters", ylabel="predicted loss, nats a token", xlim=(1e8, 1e10))
    left.set_ylim(least - 0.01, least + SHOWN_LOSS)
    set_ticks(left, [1e8, 3e8, 1e9, 3e9, 1e10])
    left.legend(frameon=False, fontsize=8, ncols=2)
    style_axes(right, "The same compute within a memory", grid="both")
    right.set(xscale="log", xlabel="weights and KV cache, GB", xlim=(min(memories) / 1e9 / 2, max(memories) / 1e9))
    set_ticks(right, [memory / 1e9 for memory in memories])
    figure.savefig(path)


def _keep_best(models: list[Candidate], losses: list[float]) -> tuple[list[float], list[float]]:
    """Return memory in GB and loss of the models that no smaller one beats, in the order of their memory."""
    kept: list[tuple[float, float]] = []
    for memory, loss in sorted((model.memory / 1e9, loss) for model, loss in zip(models, losses, strict=True)):
        if not kept or loss < kept[-1][1]:
            kept.append((memory, loss))
    return [memory for memory, _ in kept], [loss for _, loss in kept]


def draw_solutions(law: Law, marked: dict[str, tuple[float, float]], path: Path) -> None:
    """Draw the best number of experts and the loss over memory and training compute, where decoding has no limit.

    Args:
        marked: name -> (memory in bytes, training FLOPs) of models to mark, such as S, M and L.
    """
    memories, computes = np.geomspace(0.4e9, 8e9, 40), np.geomspace(5e19, 2e22, 40)
    best_MC, loss_MC = np.zeros((40, 40)), np.zeros((40, 40))
    for column, compute in enumerate(computes):
        budget = Budget(memory=float(memories[-1]), context=CONTEXT, train_flops=float(compute))
        models = [(c.memory, c.predict_loss(law), c.experts) for c in list_candidates(budget, EXPERTS, 8, True)]
        for row, memory in enumerate(memories):
            loss_MC[row, column], best_MC[row, column] = min((loss, e) for size, loss, e in models if size <= memory)
    figure = Figure(figsize=(7.4, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    levels = [level * 2**0.5 for level in (0.5, *EXPERTS)]
    # One hue from light to dark keeps its order in print without colour.
    filled = axes.contourf(computes, memories / 1e9, best_MC, levels=levels, cmap="Blues", norm="log")
    lines = axes.contour(computes, memories / 1e9, loss_MC, levels=10, colors=INK, linewidths=0.7)
    axes.clabel(lines, fmt="%.2f", fontsize=7.5)
    for name, (memory, compute) in marked.items():
        axes.plot(compute, memory / 1e9, "*", ms=13, mfc=COLOURS[4], mec=INK, zorder=3)
        axes.annotate(name, (compute, memory / 1e9), xytext=(7, 4), textcoords="offset points", fontweight="bold")
    bar = figure.colorbar(filled, ax=axes, ticks=EXPERTS, format=FuncFormatter(lambda value, _: f"{value:g}"))
    bar.set_label("best number of coarse experts E", fontsize=9, color=SOFT)
    style_axes(axes, "Best experts (shade) and predicted loss (lines, nats a token)", grid="both")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="weights and KV cache, GB")
    axes.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 3, 5, 8]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    figure.savefig(path)


def draw_residuals(points: Sequence[Point], residuals: Sequence[float], path: Path) -> None:
    """Draw log(loss) minus its prediction against size, tokens and experts; a good fit leaves no trend."""
    figure = Figure(figsize=(10.5, 3.2), dpi=150, layout="constrained")
    panels = (("active", "active parameters"), ("tokens", "tokens"), ("experts", "coarse experts E"))
    for axes, (name, label) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        axes.axhline(0, color=SOFT, lw=1)
        axes.plot([getattr(point, name) for point in points], residuals, "o", ms=4, color=COLOURS[0], alpha=0.6)
        style_axes(axes, "", grid="both")
        axes.set(xscale="log", xlabel=label)
        set_ticks(axes, [float(np.mean(scale)) for scale in group_scales(getattr(point, name) for point in points)])
    figure.axes[0].set_ylabel("log loss, measured - predicted")
    figure.savefig(path)


def set_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label these values of a logarithmic x axis and no others."""
    axes.xaxis.set_major_locator(FixedLocator(list(values)))
    axes.xaxis.set_major_formatter(FuncFormatter(format_count))
    axes.xaxis.set_minor_locator(NullLocator())


def format_count(value: float, _: int | None = None) -> str:
    """Return a count of tokens or parameters as people write it: 300k, 1.2M, 0.9B. The second argument is a tick's."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
