"""No text of a recipe holds a key: manifests, reports and logs show recipes."""

from collections.abc import Iterator
from typing import Any

from core.secret_keys import hide_keys, holds_key
from pipelines.recipe import Recipe, to_dict
from pipelines.validation.problems import Problem


def find_key_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield a problem for each text that holds a login, a signature, or the value of a secret variable."""
    for field, text in list_texts(to_dict(recipe)):
        if holds_key(text):
            rule = "holds a key, and a recipe is kept in manifests, reports and logs"
            yield Problem(field, hide_keys(text), rule, "leave it out; give it in the environment or in ~/.netrc")


def list_texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of every text in nested dicts and lists, keys of dicts included."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield field, name
            yield from list_texts(item, f"{field}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from list_texts(item, field)
    elif isinstance(value, str):
        yield field, value
