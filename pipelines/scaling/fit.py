"""Fit the law to the points of a sweep: Huber loss on the log of the loss, L-BFGS from a grid of starts, bootstrap.

The loss of a fit is sum_i Huber(log L(point i) - log loss_i), delta = 1e-3, as for Chinchilla (arXiv 2203.15556,
appendix D.3). log L is a log-sum-exp of three terms that are linear in the fitted numbers

    log A + delta ln e + alpha ln N + gamma ln e ln N,     log B + omega ln e + beta ln D + zeta ln e ln D,     log c

so A, B and c are positive and the gradient is exact. docs/scaling_law.md names the traps of such fits (arXiv
2404.10102) and how this code avoids each.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from core.errors import RefusedInput
from pipelines.scaling.law import (
    BILLION,
    ChinchillaCoefficients,
    Coefficients,
    Floats,
    Law,
    Range,
    effective_experts,
)
from pipelines.scaling.points import Point, group_scales

HUBER_DELTA = 1e-3
"""Residual of log loss above which a point counts linearly, so that single runs that went wrong pull little."""
COARSE_ITERATIONS = 25
"""L-BFGS iterations of every start, before the best ones are polished."""
POLISHED = 40
"""Number of the best starts that are polished to convergence."""
GRID = {
    "log A": (-3.0, -1.5, 0.0), "delta": (0.0, 0.2), "alpha": (-0.6, -0.3, -0.1), "gamma": (0.0, 0.05),
    "log B": (-2.0, -0.5, 1.0), "omega": (0.0, 1.0), "beta": (-0.6, -0.3, -0.1), "zeta": (-0.3, 0.0),
    "log c": (-1.0, 0.3, 0.7),
}  # fmt: skip
"""Starts in units of billions: the product, 3,888, from which `fit_law` takes an evenly spaced sample."""
NUM_STARTS = 2_000
CONFIDENCE = (2.5, 97.5)
"""Percentiles of a 95% interval."""


@dataclass(frozen=True)
class Design:
    """Points as the matrices of the log-linear terms. Shape suffixes: P points, K coefficients of a term."""

    size_PK: Floats
    data_PK: Floats
    log_loss_P: Floats

    def select(self, rows: np.ndarray) -> "Design":
        """Return the design of some of the points, possibly repeated."""
        return Design(self.size_PK[rows], self.data_PK[rows], self.log_loss_P[rows])


def build_design(points: Sequence[Point], *, with_experts: bool) -> Design:
    """Return the matrices of the joint law, or of Chinchilla's form where `with_experts` is False."""
    n = np.log([point.active / BILLION for point in points])
    d = np.log([point.tokens / BILLION for point in points])
    loss = np.log([point.loss for point in points])
    one = np.ones_like(n)
    if not with_experts:
        return Design(np.stack([one, n], 1), np.stack([one, d], 1), loss)
    e = np.log(effective_experts([point.experts for point in points]))
    return Design(np.stack([one, e, n, e * n], 1), np.stack([one, e, d, e * d], 1), loss)


def predict_log_loss(theta: Floats, design: Design) -> Floats:
    """Return log L of every point, float64 [P]."""
    terms = _compute_terms(theta, design)
    top = terms.max(0)
    return top + np.log(np.exp(terms - top).sum(0))


def _compute_terms(theta: Floats, design: Design) -> Floats:
    k = design.size_PK.shape[1]
    constant = np.full(len(design.log_loss_P), theta[-1])
    return np.stack([design.size_PK @ theta[:k], design.data_PK @ theta[k:-1], constant])


def evaluate_fit(theta: Floats, design: Design) -> tuple[float, Floats]:
    """Return the summed Huber loss in units of HUBER_DELTA^2, and its gradient.

    The unit makes a residual of delta count 1/2. In the plain unit the sum is near 1e-6, where the stopping rules of
    L-BFGS, which are absolute near 0, end the search at once.
    """
    terms = _compute_terms(theta, design)
    top = terms.max(0)
    shares = np.exp(terms - top)
    total = shares.sum(0)
    residual = (top + np.log(total) - design.log_loss_P) / HUBER_DELTA
    size = np.abs(residual)
    value = float(np.where(size <= 1, 0.5 * residual**2, size - 0.5).sum())
    slope = np.clip(residual, -1, 1) / HUBER_DELTA * shares / total
    return value, np.concatenate([slope[0] @ design.size_PK, slope[1] @ design.data_PK, [slope[2].sum()]])


class _Scaling:
    """Whitens the columns of a design, because ln N, ln e and their product are nearly dependent, and L-BFGS is slow on
    such columns.
    """

    def __init__(self, design: Design):
        (q_size, self.r_size), (q_data, self.r_data) = (np.linalg.qr(m) for m in (design.size_PK, design.data_PK))
        root = np.sqrt(len(design.log_loss_P))
        self.r_size, self.r_data = self.r_size / root, self.r_data / root
        self.design = Design(q_size * root, q_data * root, design.log_loss_P)

    def to_white(self, theta: Floats) -> Floats:
        k = len(self.r_size)
        return np.concatenate([self.r_size @ theta[:k], self.r_data @ theta[k:-1], theta[-1:]])

    def from_white(self, white: Floats) -> Floats:
        k = len(self.r_size)
        return np.concatenate(
            [np.linalg.solve(self.r_size, white[:k]), np.linalg.solve(self.r_data, white[k:-1]), white[-1:]]
        )


def list_starts(num_starts: int, *, with_experts: bool) -> Floats:
    """Return starts of the search, float64 [S, coefficients], evenly spaced in the product of GRID."""
    names = list(GRID) if with_experts else ["log A", "alpha", "log B", "beta", "log c"]
    grid = np.array(list(product(*(GRID[name] for name in names))))
    chosen = np.unique(np.linspace(0, len(grid) - 1, min(num_starts, len(grid))).round().astype(int))
    return grid[chosen]


def minimize_fit(design: Design, starts: Floats) -> tuple[Floats, float]:
    """Return the best coefficients and their loss, from L-BFGS at every start.

    Every start gets COARSE_ITERATIONS; the POLISHED best ones then run until nothing changes.
    """
    scaling = _Scaling(design)
    coarse = [_descend(scaling.to_white(start), scaling.design, COARSE_ITERATIONS) for start in starts]
    coarse.sort(key=lambda found: found[1])
    polished = [_descend(white, scaling.design, 5_000) for white, _ in coarse[:POLISHED]]
    white, value = min(polished, key=lambda found: found[1])
    return scaling.from_white(white), value


def _descend(white: Floats, design: Design, iterations: int) -> tuple[Floats, float]:
    found = minimize(
        evaluate_fit, white, args=(design,), jac=True, method="L-BFGS-B",
        options={"maxiter": iterations, "maxfun": 4 * iterations, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 20},
    )  # fmt: skip
    return found.x, float(found.fun)


@dataclass(frozen=True)
class Fit:
    """A fitted law with all that says how far to trust it."""

    law: Law
    form: str
    """`joint` (nine coefficients) or `chinchilla` (five, one number of experts)."""
    points: tuple[Point, ...]
    intervals: dict[str, tuple[float, float]]
    """95% bootstrap interval of every coefficient."""
    residuals: tuple[float, ...]
    """log(loss) - log L of every point, in the order of `points`."""
    heldout_rmse: float | None
    """Root mean square residual of the points that were held out of the fit; None where none were."""
    left_out: dict[str, float]
    """Leave-one-scale-out: a value of an input -> root mean square residual of its points under a fit without them."""
    diverged: int = 0
    """Number of bootstrap samples whose coefficients are infinite: the points hardly determine the law. They are in no
    interval."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fitted coefficients, their intervals and the errors, JSON-ready; the points are left out."""
        coefficients = asdict(self.law.coefficients)
        if self.form == "chinchilla":
            coefficients = {name: coefficients[name] for name in asdict(self.law.coefficients.fix_experts(1))}
        return {
            "form": self.form, "points": len(self.points), "coefficients": coefficients, "intervals": self.intervals,
            "rmse": self.law.rmse, "heldout_rmse": self.heldout_rmse, "left_out": self.left_out,
            "diverged": self.diverged,
        }  # fmt: skip


@threadpool_limits.wrap(limits=1, user_api="blas")
def fit_law(
    points: Sequence[Point],
    *,
    num_starts: int = NUM_STARTS,
    num_draws: int = 200,
    heldout: Sequence[Point] = (),
    seed: int = 0,
) -> Fit:
    """Fit the law to the points; points of one number of experts give Chinchilla's form.

    The matrices are small, so BLAS uses one thread: on a busy machine several wait for each other most of the time.

    Args:
        num_starts: starts of the search.
        num_draws: bootstrap samples of the points, each fitted from the solution.
        heldout: points of which only the residual is reported.
        seed: of the bootstrap.

    Raises:
        RefusedInput: the points cannot tell the coefficients apart; says what is missing.
    """
    points = list(points)
    with_experts = len({point.experts for point in points}) > 1
    check_points(points, with_experts=with_experts)
    design = build_design(points, with_experts=with_experts)
    theta, _ = minimize_fit(design, list_starts(num_starts, with_experts=with_experts))
    residuals = design.log_loss_P - predict_log_loss(theta, design)
    drawn = _draw_bootstrap(design, theta, num_draws, seed)
    draws = [draw for draw in drawn if np.isfinite(list(vars(_name_coefficients(draw)).values())).all()]
    named = np.array([list(vars(_name_coefficients(draw)).values()) for draw in draws])
    names = list(vars(_name_coefficients(theta)))
    columns = np.percentile(named, CONFIDENCE, axis=0).T if len(named) else []
    law = Law(
        coefficients=_to_joint(theta),
        source=f"fit of {len(points)} points",
        rmse=float(np.sqrt(np.mean((np.exp(design.log_loss_P) - np.exp(design.log_loss_P - residuals)) ** 2))),
        active=_range([point.active for point in points]),
        tokens=_range([point.tokens for point in points]),
        experts=_range([point.experts for point in points]),
        granularity=points[0].granularity,
        shared_expert=points[0].shared_expert,
        draws=tuple(map(_to_joint, draws)),
    )
    return Fit(
        law=law,
        form="joint" if with_experts else "chinchilla",
        points=tuple(points),
        intervals={name: (float(low), float(high)) for name, (low, high) in zip(names, columns, strict=False)},
        residuals=tuple(map(float, residuals)),
        heldout_rmse=_measure_residual(theta, heldout, with_experts) if heldout else None,
        left_out=_leave_scales_out(points, theta, with_experts),
        diverged=len(drawn) - len(draws),
    )


def _name_coefficients(theta: Floats) -> Coefficients | ChinchillaCoefficients:
    kind = Coefficients if len(theta) == len(GRID) else ChinchillaCoefficients
    values = theta.copy()
    half = len(theta) // 2
    with np.errstate(over="ignore"):  # infinite where a sample of the points leaves a coefficient undetermined
        values[[0, half, -1]] = np.exp(values[[0, half, -1]])
    return kind(*map(float, values))


def _to_joint(theta: Floats) -> Coefficients:
    """Return the coefficients as the joint law, whose terms of E are 0 where one number of experts was fitted."""
    found = _name_coefficients(theta)
    if isinstance(found, Coefficients):
        return found
    return Coefficients(found.A, 0.0, found.alpha, 0.0, found.B, 0.0, found.beta, 0.0, found.c)


def _range(values: list[float]) -> Range:
    return Range(float(min(values)), float(max(values)))


def _draw_bootstrap(design: Design, theta: Floats, num_draws: int, seed: int) -> list[Floats]:
    """Return the coefficients of fits to samples of the points, drawn with replacement."""
    rng = np.random.default_rng(seed)
    number = len(design.log_loss_P)
    draws: list[Floats] = []
    while len(draws) < num_draws:
        sample = design.select(rng.integers(number, size=number))
        # A sample may lack all but one value of an input; then its coefficients mean nothing.
        if all(np.linalg.matrix_rank(part) == part.shape[1] for part in (sample.size_PK, sample.data_PK)):
            scaling = _Scaling(sample)
            draws.append(scaling.from_white(_descend(scaling.to_white(theta), scaling.design, 5_000)[0]))
    return draws


def _measure_residual(theta: Floats, points: Sequence[Point], with_experts: bool) -> float:
    design = build_design(points, with_experts=with_experts)
    return float(np.sqrt(np.mean((design.log_loss_P - predict_log_loss(theta, design)) ** 2)))


def _leave_scales_out(points: list[Point], theta: Floats, with_experts: bool) -> dict[str, float]:
    """Return the error at every value of N, D and E of a fit to the points of other values.

    A value without which the points no longer determine the coefficients is left out of the result.
    """
    errors = {}
    for name in ("active", "tokens", *(["experts"] if with_experts else [])):
        for scale in group_scales(getattr(point, name) for point in points):
            kept = [point for point in points if getattr(point, name) not in scale]
            try:
                check_points(kept, with_experts=with_experts)
            except RefusedInput:
                continue
            scaling = _Scaling(build_design(kept, with_experts=with_experts))
            found = scaling.from_white(_descend(scaling.to_white(theta), scaling.design, 5_000)[0])
            removed = [point for point in points if getattr(point, name) in scale]
            errors[f"{name} = {np.mean(scale):.4g}"] = _measure_residual(found, removed, with_experts)
    return errors


def check_points(points: Sequence[Point], *, with_experts: bool) -> None:
    """Check that points can determine the coefficients of the joint law, or of Chinchilla's form.

    A power of N plus a constant needs three values to be told from another power. Of the joint law each number of
    experts gives one more equation, so there two sizes are enough if there are three numbers of experts.

    Raises:
        RefusedInput: they cannot; states everything that is missing.
    """
    sizes, lengths, numbers = (
        len(group_scales(getattr(point, name) for point in points)) for name in ("active", "tokens", "experts")
    )
    missing = []
    architectures = {(point.granularity, point.shared_expert) for point in points}
    if len(architectures) > 1:
        missing.append(
            f"one architecture (granularity, shared expert) at a time; there are {sorted(architectures, key=str)}"
        )
    if lengths < 3:
        missing.append(f"three different numbers of tokens; there are {lengths}")
    if with_experts:
        if numbers < 2:
            missing.append("a second number of experts; all points have the same")
        if sizes < 2 or (sizes < 3 and numbers < 3):
            missing.append(f"three sizes, or two sizes and three numbers of experts; there are {sizes} and {numbers}")
    elif sizes < 3:
        missing.append(f"three different sizes; there are {sizes}")
    needed = (9 if with_experts else 5) + 2
    if len(points) < needed:
        missing.append(f"{needed} points, two more than there are coefficients; there are {len(points)}")
    if not missing:
        design = build_design(points, with_experts=with_experts)
        for name, part in (("size", design.size_PK), ("data", design.data_PK)):
            if np.linalg.matrix_rank(part) < part.shape[1]:
                missing.append(f"points that vary {name} and experts independently of each other")
    if missing:
        raise RefusedInput("the points cannot determine the law; missing: " + "; ".join(missing))
