"""`mobilemoe recipes`: the recipes by name."""

from dataclasses import dataclass

from pipelines.commands.command import emit_result


@dataclass(frozen=True)
class Recipes:
    """List the recipes and what each needs."""

    json: bool = False
    """One JSON object on stdout."""


def list_recipes(arguments: Recipes) -> None:
    """Print name, summary and needs of every recipe."""
    from pipelines.recipes import RECIPES

    listed = {name: {"summary": entry.summary, "needs": entry.needs} for name, entry in RECIPES.items()}
    text = "\n".join(
        f"{name:6} {entry.summary}\n" + "".join(f"         needs {need}\n" for need in entry.needs.splitlines())
        for name, entry in RECIPES.items()
    )
    emit_result(arguments.json, listed, lambda: text)
