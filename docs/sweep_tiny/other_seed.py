"""The width 64 of the sweep `tiny` with another seed: how far single runs scatter."""

from dataclasses import replace

from pipelines.scaling.sweep import tiny
from pipelines.scaling.sweep.grid import Grid, Sweep


def sweep() -> Sweep:
    """Return the runs of width 64 with E = 8 and the dense one, with the next seed."""
    made = tiny.sweep()
    grids = (
        Grid(d_model=(64,), experts=(1, 8), granularity=(4, 8), tokens=tiny.TOKENS),
        Grid(d_model=(64,), experts=(8,), shared=(False,), tokens=tiny.TOKENS),
    )
    return replace(made, recipe=replace(made.recipe, seed=made.recipe.seed + 1), grids=grids)
