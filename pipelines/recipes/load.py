"""Load a recipe from a Python file of the user, or from the manifest of a run."""

import importlib.util
import json
import traceback
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from core.errors import RefusedInput, report_damage
from core.printable import make_line
from pipelines.recipe import Recipe


def load_recipe_file(path: Path) -> Recipe:
    """Run a Python file and return what its function `recipe()` returns.

    Raises:
        RefusedInput: the file is missing, raises, has no function `recipe`, or the function returns no Recipe.
    """
    made = call_function_of_file(path, "recipe", "pipelines/recipes/s.py")
    if not isinstance(made, Recipe):
        raise RefusedInput(f"recipe {path}: recipe() returned a {type(made).__name__}, not a pipelines.recipe.Recipe")
    return made


def call_function_of_file(path: Path, name: str, example: str) -> Any:
    """Run a Python file and return what its function `name`, which takes no argument, returns.

    Args:
        name: `recipe` or `sweep`.
        example: file of this repository that has such a function.

    Raises:
        RefusedInput: the file is missing, raises, or has no such function; names the line of the user's file.
    """
    if not path.is_file():
        raise RefusedInput(f"{name} {path}: no such file; give a Python file with a function `{name}()`")
    spec = importlib.util.spec_from_file_location(f"mobilemoe_user_{name}", path.absolute())
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RefusedInput(f"{name} {path}: {_describe(error, path)}; correct the file") from error
    build = getattr(module, name, None)
    if not callable(build):
        raise RefusedInput(f"{name} {path}: has no function `{name}`; define {name}() ({example})")
    try:
        return build()
    except Exception as error:
        raise RefusedInput(f"{name} {path}: {name}() raised {_describe(error, path)}; correct the file") from error


def _describe(error: Exception, path: Path) -> str:
    """Return type and message of an error, and the line of the user's file that it came from."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} in line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
    where = f" in line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def load_recipe_of_run(run: Path) -> Recipe:
    """Return the recipe that the manifest of a run folder records.

    Raises:
        RefusedInput: the folder holds no run, or its recipe has other fields or types than this version's.
        DamagedData: the manifest is damaged.
    """
    manifest = run / "manifest.json"
    if not manifest.is_file():
        raise RefusedInput(
            f"--like {run}: no manifest.json, so no run; give the folder that `mobilemoe run --out` named"
        )
    with report_damage(manifest, "take another run, or start from a recipe file"):
        recipe = json.loads(manifest.read_text(encoding="utf-8"))["recipe"]
        return _build(Recipe, recipe, f"--like {run}: recipe")


def _build(kind: type, value: dict[str, Any], where: str) -> Any:
    """Return an object of the dataclass `kind` from nested dictionaries, as `pipelines.recipe.to_dict` makes them."""
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(value) - known):
        raise RefusedInput(
            f"{where}: this version knows no field {', '.join(unknown)}; the run was made by another version, so start "
            "from a recipe file"
        )
    hints = get_type_hints(kind)
    return kind(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, list):
        inner = get_args(hint)[0]
        return tuple(_convert(inner, item, where) for item in value)
    if get_origin(hint) is dict and isinstance(value, dict):
        return {name: _convert(get_args(hint)[1], item, f"{where}.{name}") for name, item in value.items()}
    if get_origin(hint) is dict and not isinstance(value, dict):
        raise RefusedInput(
            f"{where}: is {value!r}, and this version has a value for each name there; the run was made by another "
            "version, so start from a recipe file"
        )
    if not _fits(hint, value):
        raise RefusedInput(f"{where}: is {make_line(repr(value)[:100])}, which is no {hint}; start from a recipe file")
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value of JSON is one of a plain type, a Literal, or a union of such."""
    if get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(choice, value) for choice in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
