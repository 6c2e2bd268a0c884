"""`Problem`, one broken rule of a recipe, and the helpers that every file of rules uses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import RefusedInput


@dataclass(frozen=True)
class Problem:
    """One broken rule: the field, its value, the rule and the way out."""

    field: str
    value: Any
    rule: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.rule}; {self.way_out}"


class InvalidRecipe(RefusedInput):
    """The recipe breaks rules; `problems` holds them all."""

    def __init__(self, name: str, problems: list[Problem]):
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"recipe {name!r} cannot run, {len(problems)} problem(s):\n{lines}")


def find_nonpositive(prefix: str, config: Any, names: tuple[str, ...]) -> Iterator[Problem]:
    """Yield a problem for each named field of `config` that is not above 0, or not finite. None is left out."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            yield Problem(f"{prefix}.{name}", value, "must be above 0 and finite", "set a positive number")


def divides(small: int, large: int) -> bool:
    """Return whether large is a multiple of small; True for a small below 1, which `find_nonpositive` reports."""
    return small <= 0 or large % small == 0


def list_divisors(number: int) -> str:
    """Return the divisors of a number as text, the dozen smallest where there are more."""
    return ", ".join(str(n) for n in [n for n in range(1, number + 1) if number % n == 0][:12])
