"""Count how often the fit's 95% intervals contain the coefficients that the points were drawn from.

    python benchmarks/scaling_coverage.py [--sweeps 100] [--draws 200]

Every sweep has the same grid of sizes, tokens and experts and noise of its own.
"""

import argparse
import time
from dataclasses import asdict

import numpy as np

from pipelines.scaling.fit import fit_law
from pipelines.scaling.law import PUBLISHED
from pipelines.scaling.points import Point

SIZES, TOKENS, EXPERTS = (0.1e9, 0.3e9, 0.9e9, 2e9), (20e9, 60e9, 200e9, 600e9), (1, 2, 4, 8, 16, 32)
NOISE = 2e-3
"""Standard deviation of log loss: two runs of one recipe with other seeds differ by about as much."""


def draw_sweep(seed: int) -> list[Point]:
    """Return a point for every cell of the grid, with the published law's loss and noise."""
    rng = np.random.default_rng(seed)
    cells = [(n, d, e) for n in SIZES for d in TOKENS for e in EXPERTS]
    losses = [float(PUBLISHED.coefficients.predict_loss(*cell)) * float(np.exp(NOISE * rng.normal())) for cell in cells]
    return [Point(n, d, e, loss) for (n, d, e), loss in zip(cells, losses, strict=True)]


def main() -> None:
    """Print, for every coefficient, the share of the sweeps whose interval contains it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--draws", type=int, default=200, help="bootstrap samples of each fit")
    arguments = parser.parse_args()
    true = asdict(PUBLISHED.coefficients)
    hits, errors, begin = dict.fromkeys(true, 0), [], time.perf_counter()
    for seed in range(arguments.sweeps):
        fit = fit_law(draw_sweep(seed), num_starts=60, num_draws=arguments.draws, seed=seed)
        for name, (low, high) in fit.intervals.items():
            hits[name] += low <= true[name] <= high
        errors.append(float(fit.law.coefficients.predict_loss(0.5e9, 300e9, 8)))
    for name, count in hits.items():
        print(f"{name:6} {true[name]:8.4f} in {count} of {arguments.sweeps} intervals")
    exact = float(PUBLISHED.coefficients.predict_loss(0.5e9, 300e9, 8))
    print(f"prediction at 0.5B, 300B, E = 8: {exact:.4f}, off by {np.std(np.array(errors) - exact):.5f} nats (std)")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
