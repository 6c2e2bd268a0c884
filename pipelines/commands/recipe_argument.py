"""The first words of `run` and `plan`: a recipe by name, a Python file, or `--like RUN`."""

from collections.abc import Sequence
from pathlib import Path

from core.errors import RefusedInput
from pipelines.commands.command import UsageShown, require_known
from pipelines.recipe import Recipe


def choose_recipe(command: str, options: str, words: Sequence[str]) -> tuple[Recipe, str, Sequence[str]]:
    """Return the recipe that the first words name, these words as a title, and the words that are left.

    Args:
        command: subcommand, for the usage.
        options: options of the subcommand itself, for the usage.

    Raises:
        RefusedInput: there is no such recipe, or the file or run gives none.
        UsageShown: no recipe is named.
    """
    from pipelines.recipes import RECIPES
    from pipelines.recipes.load import load_recipe_file, load_recipe_of_run

    if not words or words[0] in ("-h", "--help"):
        raise UsageShown(
            f"usage: mobilemoe {command} RECIPE|FILE.py|--like RUN {options} [overrides]\n\n"
            f"RECIPE: {', '.join(RECIPES)}; mobilemoe {command} RECIPE --help lists every override\n"
            "FILE.py: a Python file whose function recipe() returns a Recipe\n"
            "--like RUN: the recipe of a run folder",
            asked=bool(words),
        )
    first, *rest = words
    if first == "--like":
        if not rest:
            raise RefusedInput("--like: give the folder of a run")
        return load_recipe_of_run(Path(rest[0])), f"--like {rest[0]}", rest[1:]
    if first.endswith(".py"):
        return load_recipe_file(Path(first)), first, rest
    require_known("recipe", first, RECIPES)
    return RECIPES[first].build(), first, rest
