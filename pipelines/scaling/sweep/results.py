"""Compare the points of a sweep: experts against dense at equal compute and memory, granularity, learning rate."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from core.atomic import write_json, write_text
from core.errors import RefusedInput
from pipelines.scaling.fit import Fit, fit_law
from pipelines.scaling.points import FIELDS, Point, list_rule_points, select_architecture


@dataclass(frozen=True)
class Comparison:
    """Two models of a sweep that share something."""

    point: Point
    other: str
    """The model that `point` is compared with, in words."""
    difference: float
    """Loss of `point` minus that of the other, in nats a token; below 0 `point` is better."""


def write_points(points: Sequence[Point], folder: Path) -> None:
    """Write points.csv and points.json; `scaling-law fit` reads the CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    rows = [asdict(point) for point in points]
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    write_text(folder / "points.csv", text.getvalue())
    write_json(folder / "points.json", rows)


def list_architectures(points: Sequence[Point]) -> list[tuple[int, bool]]:
    """Return (granularity, shared expert) of the points with experts, in order."""
    return sorted({(p.granularity, bool(p.shared_expert)) for p in points if p.granularity is not None})


def fit_architectures(points: Sequence[Point], *, num_starts: int, num_draws: int) -> dict[str, Fit | str]:
    """Fit the law to the points of every architecture, the dense models among each, and to the dense models alone.

    Returns:
        Name of the architecture -> the fit, or the text that says what its points lack.
    """
    points = list_rule_points(points)
    sets = {"dense": [point for point in points if point.experts == 1]}
    for granularity, shared in list_architectures(points):
        sets[name_architecture(granularity, shared)] = select_architecture(points, granularity, shared)
    fits: dict[str, Fit | str] = {}
    for name, chosen in sets.items():
        try:
            fits[name] = fit_law(chosen, num_starts=num_starts, num_draws=num_draws)
        except RefusedInput as error:
            fits[name] = str(error)
    return fits


def name_architecture(granularity: int | None, shared: bool | None) -> str:
    """Return g8_shared, g8, or dense."""
    return "dense" if granularity is None else f"g{granularity}{'_shared' if shared else ''}"


def compare_with_dense(points: Sequence[Point]) -> list[Comparison]:
    """Compare every model with experts with the dense model of the same width and tokens: equal training compute.

    The active parameters differ by the router's, at most a few percent.
    """
    points = list_rule_points(points)
    dense = {(_width(point), point.tokens): point for point in points if point.experts == 1}
    return [
        Comparison(point, "dense, equal training compute", point.loss - dense[_width(point), point.tokens].loss)
        for point in points
        if point.experts > 1 and (_width(point), point.tokens) in dense
    ]


def compare_at_equal_memory(points: Sequence[Point]) -> list[Comparison]:
    """Compare every model with experts with a dense model of as many parameters in all, trained on the same tokens.

    The dense model costs more training and decoding. Its loss is interpolated in log loss against log parameters
    between the dense models of the sweep; points that are larger than the largest dense model have no comparison.
    """
    points = list_rule_points(points)
    found = []
    for point in points:
        curve = sorted((p.active, p.loss) for p in points if p.experts == 1 and p.tokens == point.tokens)
        if point.experts == 1 or point.total is None or not curve or not curve[0][0] <= point.total <= curve[-1][0]:
            continue
        loss = _interpolate(curve, point.total)
        found.append(Comparison(point, "dense, equal memory and tokens", point.loss - loss))
    return found


def _interpolate(curve: Sequence[tuple[float, float]], size: float) -> float:
    for (low, low_loss), (high, high_loss) in pairwise(curve):
        if size <= high:
            share = log(size / low) / log(high / low)
            return low_loss ** (1 - share) * high_loss**share
    raise AssertionError("the size lies on the curve")


def compare_architectures(points: Sequence[Point]) -> list[Comparison]:
    """Compare every architecture with the coarsest one of the same width, experts and tokens."""
    points = list_rule_points(points)
    groups: dict[tuple[str, float, float], list[Point]] = {}
    for point in points:
        if point.granularity is not None:
            groups.setdefault((_width(point), point.experts, point.tokens), []).append(point)
    found = []
    for group in groups.values():
        base = min(group, key=lambda p: (p.granularity or 0, bool(p.shared_expert)))
        name = name_architecture(base.granularity, base.shared_expert)
        found += [Comparison(point, name, point.loss - base.loss) for point in group if point is not base]
    return found


def compare_learning_rates(points: Sequence[Point]) -> list[Comparison]:
    """Compare the points of other learning rates with those of the rule."""
    rule = {(_model(point), point.tokens): point for point in list_rule_points(points)}
    return [
        Comparison(point, "the rule's learning rate", point.loss - rule[_model(point), point.tokens].loss)
        for point in points
        if point.learning_rate_factor not in (None, 1.0) and (_model(point), point.tokens) in rule
    ]


def _model(point: Point) -> str:
    """Return the model's part of a run's name: d64_E8_g8_shared of d64_E8_g8_shared_lr2."""
    return point.name.partition("_lr")[0]


def _width(point: Point) -> str:
    return point.name.partition("_")[0]


def summarize(points: Sequence[Point], fits: dict[str, Fit | str]) -> dict[str, Any]:
    """Return comparisons and fits, JSON-ready."""
    comparisons = {
        "equal_compute": compare_with_dense(points), "equal_memory": compare_at_equal_memory(points),
        "architectures": compare_architectures(points), "learning_rates": compare_learning_rates(points),
    }  # fmt: skip
    return {
        "points": len(points),
        "fits": {name: {"refused": fit} if isinstance(fit, str) else fit.to_dict() for name, fit in fits.items()},
        **{name: [_describe(comparison) for comparison in found] for name, found in comparisons.items()},
    }


def _describe(comparison: Comparison) -> dict[str, Any]:
    point = comparison.point
    return {
        "name": point.name, "tokens": point.tokens, "loss": point.loss, "compared_with": comparison.other,
        "difference": comparison.difference, "step_seconds": point.step_seconds,
    }  # fmt: skip
