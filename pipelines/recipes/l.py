"""`l`: MobileMoE-L (5.3B parameters, 922M active) with the published schedule.

Needs a tokenizer, hub access and GPUs: `pipelines.recipes.published.needs`, printed by `mobilemoe recipes`.
"""

from pipelines.recipe import Recipe
from pipelines.recipes.published import published

WORLD_SIZE = 256
"""Assumed; the paper does not state its number of GPUs."""


def recipe() -> Recipe:
    """MobileMoE-L: 5.3B parameters, 922M active."""
    return published("L", WORLD_SIZE)
