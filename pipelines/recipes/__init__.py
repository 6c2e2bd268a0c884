"""The shipped recipes, by name: each is a function that returns a `Recipe`."""

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.recipe import Recipe
from pipelines.recipes import l, m, published, s, smoke


@dataclass(frozen=True)
class Entry:
    """A recipe on the list of `mobilemoe recipes`."""

    build: Callable[[], Recipe]
    summary: str
    needs: str
    """What the user has to bring; empty for none."""


RECIPES: dict[str, Entry] = {
    "smoke": Entry(smoke.recipe, "a 3M-parameter model through every step on one CPU machine, in minutes", ""),
    "s": Entry(s.recipe, "MobileMoE-S, 1.3B / 272M active", published.needs(s.recipe())),
    "m": Entry(m.recipe, "MobileMoE-M, 2.8B / 528M active", published.needs(m.recipe())),
    "l": Entry(l.recipe, "MobileMoE-L, 5.3B / 922M active", published.needs(l.recipe())),
}
