"""The pictures of a sweep: its own points, beside the law that was fitted to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipelines.scaling.figures import (
    COLOURS,
    INK,
    MARKERS,
    draw_experts,
    draw_residuals,
    format_count,
    set_ticks,
    style_axes,
)
from pipelines.scaling.fit import Fit
from pipelines.scaling.points import Point, group_scales, list_rule_points
from pipelines.scaling.sweep.results import list_architectures, name_architecture


def draw_sweep(points: Sequence[Point], fits: dict[str, Fit | str], folder: Path) -> None:
    """Draw compute.png, memory.png and architectures.png, and for every fitted law experts and residuals."""
    folder.mkdir(parents=True, exist_ok=True)
    points = list_rule_points(points)
    draw_against(points, "train_flops", "training FLOPs, 6 x active parameters x tokens", folder / "compute.png")
    draw_against(points, "total", "all parameters (memory)", folder / "memory.png")
    draw_architectures(points, folder / "architectures.png")
    for name, fit in fits.items():
        if isinstance(fit, str):
            continue
        draw_residuals(fit.points, fit.residuals, folder / f"residuals_{name}.png")
        if fit.form == "joint":
            sizes = _pick_sizes(fit.points)
            tokens = sorted({point.tokens for point in fit.points})
            draw_experts(fit.law, sizes, tokens, fit.points, folder / f"experts_{name}.png")
            draw_isoflop(fit, folder / f"isoflop_{name}.png")


def draw_against(points: Sequence[Point], field: str, label: str, path: Path) -> None:
    """Draw the loss against a field of the points, a line for every number of experts.

    The lines of training FLOPs go through the numbers of tokens of one width, those of the total parameters through the
    widths at the largest number of tokens. Only the finest architecture and the dense models are drawn.
    """
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    finest = max(list_architectures(points), default=None)
    longest = max(point.tokens for point in points)
    for number, experts in enumerate(sorted({point.experts for point in points})):
        chosen = [p for p in points if p.experts == experts and (experts == 1 or _architecture(p) == finest)]
        if field == "train_flops":
            lines = [[p for p in chosen if p.name == name] for name in dict.fromkeys(p.name for p in chosen)]
        else:
            lines = [sorted((p for p in chosen if p.tokens == longest), key=lambda p: p.active)]
        for i, line in enumerate(lines):
            axes.plot(
                [getattr(p, field) for p in line], [p.loss for p in line], color=COLOURS[number], lw=1.3,
                marker=MARKERS[number], ms=5, label=_name_experts(experts) if i == 0 else None,
            )  # fmt: skip
    title = "Held-out loss at equal training compute" if field == "train_flops" else "Held-out loss at equal memory"
    style_axes(axes, title)
    axes.set(xscale="log", xlabel=label, ylabel="held-out loss, nats a token")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(_format_flops if field == "train_flops" else format_count))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _format_flops(value: float, _: int | None = None) -> str:
    return f"{value:.0e}".replace("e+", "e")


def _architecture(point: Point) -> tuple[int | None, bool]:
    return point.granularity, bool(point.shared_expert)


def _name_experts(experts: float) -> str:
    return "dense" if experts == 1 else f"E = {experts:g}"


def draw_architectures(points: Sequence[Point], path: Path) -> None:
    """Draw the loss of every granularity, with and without a shared expert, against the tokens: a panel a model."""
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.active, point.experts)):
        if point.granularity is not None:
            groups.setdefault("_".join(point.name.split("_")[:2]), []).append(point)
    panels = {name: group for name, group in groups.items() if len(list_architectures(group)) > 1}
    if not panels:
        return
    figure = Figure(figsize=(3.4 * len(panels), 3.6), dpi=150, layout="constrained")
    architectures = list_architectures([point for group in panels.values() for point in group])
    for axes, (name, group) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for number, architecture in enumerate(architectures):
            line = sorted((p for p in group if _architecture(p) == architecture), key=lambda p: p.tokens)
            if line:
                axes.plot(
                    [p.tokens for p in line], [p.loss for p in line], color=COLOURS[number % len(COLOURS)], lw=1.3,
                    marker=MARKERS[number % len(MARKERS)], ms=5, label=name_architecture(*architecture),
                )  # fmt: skip
        style_axes(axes, name.replace("_", ", "))
        axes.set(xscale="log", xlabel="training tokens")
        set_ticks(axes, sorted({p.tokens for p in group}))
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("held-out loss, nats a token")
    figure.savefig(path)


ISOFLOP_TOLERANCE = 1.25
"""Largest ratio of the compute of a measured point to that of the curve it is drawn on."""


def draw_isoflop(fit: Fit, path: Path) -> None:
    """Draw the law at three training computes against the active parameters, with the points of nearly that compute."""
    figure = Figure(figsize=(10.5, 3.8), dpi=150, layout="constrained")
    flops = [point.train_flops for point in fit.points if point.train_flops]
    computes = np.geomspace(min(flops) * 2, max(flops) / 2, 3)
    low, high = fit.law.active.low, fit.law.active.high
    sizes = np.geomspace(low / 1.5, high * 1.5, 60)
    for axes, compute in zip(figure.subplots(1, 3, sharey=True), computes, strict=True):
        for number, experts in enumerate(sorted({point.experts for point in fit.points})):
            curve = fit.law.coefficients.predict_loss(sizes, compute / (6 * sizes), experts)
            axes.plot(sizes, curve, color=COLOURS[number], lw=1.3, label=_name_experts(experts))
            near = [
                p for p in fit.points
                if p.experts == experts and p.train_flops
                and 1 / ISOFLOP_TOLERANCE < p.train_flops / compute < ISOFLOP_TOLERANCE
            ]  # fmt: skip
            axes.plot(
                [p.active for p in near], [p.loss for p in near], MARKERS[number], color=COLOURS[number], mec=INK, ms=6
            )
        style_axes(axes, f"{compute:.1e} FLOPs")
        axes.set(xscale="log", xlabel="active parameters")
        set_ticks(axes, _pick_sizes(fit.points))
    figure.axes[0].set_ylabel("held-out loss, nats a token")
    figure.axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _pick_sizes(points: Sequence[Point]) -> list[float]:
    """Return one number of active parameters for each scale, rounded to three digits."""
    return [float(f"{np.mean(scale):.3g}") for scale in group_scales(point.active for point in points)]
