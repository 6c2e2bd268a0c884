"""The sweep `published`: the grid behind the published law (arXiv 2605.27358), as an example with its estimate.

Published: E 1 to 32, 0.3B to 0.9B active parameters, 100B to 500B tokens, granularity 1 to 16, with and without a
shared expert. Not published, so assumed here: which combinations were trained. Here all sizes and numbers of experts
have granularity 8 and a shared expert; the other architectures are trained at 0.5B and E = 8.
"""

from dataclasses import replace

from pipelines.recipe import Recipe
from pipelines.recipes.published import build_published
from pipelines.scaling.sweep.grid import Grid, Sweep
from titan_ext.config import FLAVORS

WIDTHS = (768, 1024, 1280)
"""d_model of S, M and L: 0.3B, 0.5B and 0.9B active parameters."""
TOKENS = (100e9, 200e9, 300e9, 400e9, 500e9)


def build_recipe() -> Recipe:
    """Return the recipe of all points: M's on 64 GPUs, whose checkpoints are an hour apart."""
    base = build_published("sweep-published", FLAVORS["M"], world_size=64)
    return replace(base, stages=replace(base.stages, pretrain=replace(base.stages.pretrain, checkpoint_interval=5_000)))


def sweep() -> Sweep:
    """Return the grids of the published sweep. Its learning rate is the published one at every width."""
    return Sweep(
        recipe=build_recipe(),
        learning_rate=4e-4,
        base_width=1024,
        width_exponent=0.0,
        grids=(
            Grid(d_model=WIDTHS, experts=(1, 2, 4, 8, 16, 32), tokens=TOKENS),
            Grid(d_model=(1024,), experts=(8,), granularity=(1, 2, 4, 8, 16), shared=(True, False), tokens=TOKENS),
        ),
    )
