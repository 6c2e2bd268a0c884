"""`s`: MobileMoE-S (1.3B parameters, 272M active) with the published schedule.

Needs a tokenizer, hub access and GPUs: `pipelines.recipes.published.needs`, printed by `mobilemoe recipes`.
"""

from pipelines.recipe import Recipe
from pipelines.recipes.published import published

WORLD_SIZE = 64
"""Assumed; the paper does not state its number of GPUs."""


def recipe() -> Recipe:
    """MobileMoE-S: 1.3B parameters, 272M active."""
    return published("S", WORLD_SIZE)
