"""`m`: MobileMoE-M (2.8B parameters, 528M active) with the published schedule.

Needs a tokenizer, hub access and GPUs: `pipelines.recipes.published.needs`, printed by `mobilemoe recipes`.
"""

from pipelines.recipe import Recipe
from pipelines.recipes.published import published

WORLD_SIZE = 128
"""Assumed; the paper does not state its number of GPUs."""


def recipe() -> Recipe:
    """MobileMoE-M: 2.8B parameters, 528M active."""
    return published("M", WORLD_SIZE)
