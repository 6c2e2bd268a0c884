"""How often a run repeats each domain, and the rule against more than `data.max_epochs`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from data.mixture import count_split_tokens
from pipelines.recipe import Recipe
from pipelines.validation.problems import Problem


@dataclass(frozen=True)
class Repetition:
    """One domain of one stage."""

    share: float
    wanted: float
    """Tokens that the stage takes of the domain."""
    available: float | None
    """Tokens that the domain's corpora have in the shards of the stage; None where that is unknown."""

    @property
    def epochs(self) -> float | None:
        """Return how often the stage goes through the domain; None where that is unknown."""
        if self.available is None:
            return None
        return self.wanted / self.available if self.available else math.inf


def count_repetitions(recipe: Recipe) -> dict[str, dict[str, Repetition]]:
    """Return stage -> domain -> what the stage takes of it and what there is, for the domains that have a corpus."""
    available = count_split_tokens(recipe.data)
    return {
        name: {
            domain: Repetition(share, share * stage.tokens, available[stage.shards][domain])
            for domain, share in stage.mixture.items()
            if share and domain in available[stage.shards]
        }
        for name, stage in recipe.stages.items()
    }


def find_epoch_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each domain that a stage repeats more often than `data.max_epochs` allows."""
    for name, domains in count_repetitions(recipe).items():
        stage, limit = recipe.stages.get(name), recipe.data.max_epochs[name]
        for domain, repetition in domains.items():
            epochs = repetition.epochs
            if epochs is None or repetition.available is None or epochs <= limit:
                continue
            rule = f"stage {name} takes {repetition.wanted / 1e9:,.2f}B tokens of {domain} (share "
            rule += f"{repetition.share:g}), which has {repetition.available / 1e9:,.3f}B: {epochs:,.1f} epochs"
            # A tenth less than what just fits is still below it when it is rounded to two digits.
            way_out = f"add corpora, or lower the share to {0.9 * repetition.share * limit / epochs:.2g}"
            if math.isfinite(epochs):
                way_out += f", or allow it: --data.max-epochs.{name} {math.ceil(epochs)}"
            elif stage.shards != "sft":
                way_out += f", or change data.midtrain_fraction.{domain}"
            yield Problem(f"data.max_epochs.{name}", limit, rule, way_out)
