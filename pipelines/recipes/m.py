"""`m`: MobileMoE-M (2.8B parameters, 528M active) with the published schedule.

It needs a tokenizer, access to the hub and GPUs; `mobilemoe recipes` prints the details.
"""

from pipelines.recipe import Recipe
from pipelines.recipes.published import build_published
from titan_ext.config import FLAVORS

WORLD_SIZE = 128
"""Number of GPUs. Assumed: the paper does not state it."""


def recipe() -> Recipe:
    """Return the recipe of MobileMoE-M: 2.8B parameters, 528M active."""
    return build_published("m", FLAVORS["M"], WORLD_SIZE)
