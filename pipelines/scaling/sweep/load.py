"""Load a sweep: by its name, from a Python file with a function `sweep()`, or from JSON."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from core.errors import RefusedInput
from pipelines.recipe import Recipe
from pipelines.recipes import RECIPES
from pipelines.recipes.load import call_function_of_file, load_recipe_file
from pipelines.scaling.sweep import published, tiny
from pipelines.scaling.sweep.grid import Grid, Sweep

SWEEPS: dict[str, Callable[[], Sweep]] = {"tiny": tiny.sweep, "published": published.sweep}
"""Name of a shipped sweep -> the function that builds it."""


def load_sweep(name: str) -> Sweep:
    """Return the sweep of a name, of a Python file or of a JSON file.

    Raises:
        RefusedInput: there is no such sweep or file, or the file gives none; names the field where one is wrong.
    """
    path = Path(name)
    if name in SWEEPS:
        return SWEEPS[name]()
    if path.suffix == ".py":
        made = call_function_of_file(path, "sweep", "pipelines/scaling/sweep/tiny.py")
        if not isinstance(made, Sweep):
            raise RefusedInput(f"{path}: sweep() returned a {type(made).__name__}, not a Sweep")
        return made
    if path.suffix == ".json":
        return _read_json(path)
    raise RefusedInput(f"sweep {name!r}: give {', '.join(SWEEPS)}, a Python file with sweep(), or a JSON file")


def _read_json(path: Path) -> Sweep:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RefusedInput(f"{path}: cannot be read as JSON ({error}); correct the file") from error
    _require_fields(content, Sweep, str(path))
    grids = content["grids"]
    if not isinstance(grids, list):
        raise RefusedInput(f"{path}, grids: must be a list of objects")
    for number, grid in enumerate(grids):
        _require_fields(grid, Grid, f"{path}, grids[{number}]")
        if wrong := [name for name, values in grid.items() if not isinstance(values, list)]:
            raise RefusedInput(f"{path}, grids[{number}].{wrong[0]} = {grid[wrong[0]]!r}: must be a list")
    numbers = {name: content[name] for name in content if name not in ("recipe", "grids")}
    for name, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise RefusedInput(f"{path}, {name} = {value!r}: must be a number")
    built = tuple(Grid(**{name: tuple(values) for name, values in grid.items()}) for grid in grids)
    return Sweep(recipe=_load_recipe(content["recipe"], path), grids=built, **numbers)


def _require_fields(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, dict):
        raise RefusedInput(f"{where}: must be a JSON object")
    known = {field.name for field in fields(kind)}
    required = {"Sweep": {"recipe", "grids", "learning_rate", "base_width"}, "Grid": {"d_model", "experts", "tokens"}}
    if unknown := sorted(set(value) - known):
        raise RefusedInput(f"{where}: has no field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
    if missing := sorted(required[kind.__name__] - set(value)):
        raise RefusedInput(f"{where}: lacks {', '.join(missing)}; the fields are {', '.join(sorted(known))}")


def _load_recipe(name: Any, path: Path) -> Recipe:
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name].build()
    if isinstance(name, str) and name in SWEEPS:
        return SWEEPS[name]().recipe
    if isinstance(name, str) and name.endswith(".py"):
        return load_recipe_file(path.parent / name)
    choices = [*RECIPES, *(sweep for sweep in SWEEPS if sweep not in RECIPES)]
    raise RefusedInput(f"{path}, recipe = {name!r}: give {', '.join(choices)}, or a Python file beside this one")
