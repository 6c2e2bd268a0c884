"""The shipped recipes, by name: each is a function that returns a `Recipe`."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.recipe import Recipe
from pipelines.recipes import hour, l, m, published, s, smoke


@dataclass(frozen=True)
class Entry:
    """One recipe of the list that `mobilemoe recipes` prints."""

    build: Callable[[], Recipe]
    summary: str
    needs: str
    """Requirements that the user must provide, one a line; empty if there are none."""


RECIPES: dict[str, Entry] = {
    "smoke": Entry(smoke.recipe, "a 3M-parameter model through every step on one CPU machine, in minutes", ""),
    "hour": Entry(hour.recipe, "a 2M-parameter model that answers generated questions, in an hour on two cores", ""),
    "s": Entry(s.recipe, "MobileMoE-S, 1.3B / 272M active", published.describe_needs(s.recipe())),
    "m": Entry(m.recipe, "MobileMoE-M, 2.8B / 528M active", published.describe_needs(m.recipe())),
    "l": Entry(l.recipe, "MobileMoE-L, 5.3B / 922M active", published.describe_needs(l.recipe())),
}
