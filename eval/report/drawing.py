"""What all pictures of the report share: colours that colour-blind readers tell apart, sizes, and the style of axes."""

from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#56b4e9"
"""Hues of Okabe and Ito, and one of Tol; figures give every series a marker of its own, too."""
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
REFERENCE, INK, SOFT, GRID = "#8a8f98", "#22262b", "#555b63", "#eceef1"
MARKERS = ("o", "s", "^", "D", "v")
LINE: dict[str, Any] = {"linewidth": 1.6, "solid_capstyle": "round"}
WIDE, NARROW = 11.0, 5.2
"""Widths of a picture in inches: for a desk, and for a phone, where panels stand below each other."""


def make_figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes are in inches."""
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def style_axes(axes: Axes, title: str, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Give axes a title and quiet lines; `grid` is the axis that gets lines."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c4c8ce")
    axes.tick_params(colors=SOFT, labelsize=8.5)
    axes.xaxis.label.set(size=9, color=SOFT)
    axes.yaxis.label.set(size=9, color=SOFT)
    if grid:
        axes.grid(axis=grid, color=GRID)
        axes.set_axisbelow(True)
