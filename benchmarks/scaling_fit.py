"""Time the fit of the scaling law: 2,000 starts over 200 points, on one core.

OMP_NUM_THREADS=1 python benchmarks/scaling_fit.py
"""

import time

import numpy as np

from pipelines.scaling.fit import NUM_STARTS, build_design, list_starts, minimize_fit
from pipelines.scaling.law import PUBLISHED
from pipelines.scaling.points import Point

NUM_POINTS, NOISE = 200, 1e-3


def main() -> None:
    """Print the time of one fit to points of the published law with noise."""
    rng = np.random.default_rng(0)
    points = []
    for _ in range(NUM_POINTS):
        active, tokens = rng.choice([0.3e9, 0.5e9, 0.9e9]), rng.choice([100e9, 200e9, 300e9, 400e9, 500e9])
        experts = rng.choice([1, 2, 4, 8, 16, 32])
        loss = float(PUBLISHED.coefficients.predict_loss(active, tokens, experts))
        points.append(Point(active, tokens, experts, loss * float(np.exp(NOISE * rng.standard_normal()))))
    design, starts = build_design(points, with_experts=True), list_starts(NUM_STARTS, with_experts=True)
    begin = time.perf_counter()
    _, value = minimize_fit(design, starts)
    print(f"{len(starts):,} starts, {NUM_POINTS} points: {time.perf_counter() - begin:.1f} s, loss {value:.1f}")


if __name__ == "__main__":
    main()
