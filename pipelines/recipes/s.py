"""`s`: MobileMoE-S (1.3B parameters, 272M active) with the published schedule.

It needs a tokenizer, access to the hub and GPUs; `mobilemoe recipes` prints the details.
"""

from pipelines.recipe import Recipe
from pipelines.recipes.published import build_published
from titan_ext.config import FLAVORS

WORLD_SIZE = 64
"""Number of GPUs. Assumed: the paper does not state it."""


def recipe() -> Recipe:
    """Return the recipe of MobileMoE-S: 1.3B parameters, 272M active."""
    return build_published("s", FLAVORS["S"], WORLD_SIZE)
