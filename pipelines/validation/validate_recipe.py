"""Refuse a recipe that cannot run, before anything starts, and report all its problems at once."""

import re
from collections.abc import Iterator

from core.errors import RefusedInput
from pipelines.recipe import Recipe
from pipelines.validation import input_rules, training_rules
from pipelines.validation.epoch_rules import find_epoch_problems
from pipelines.validation.key_rules import find_key_problems
from pipelines.validation.memory_rules import find_memory_problems
from pipelines.validation.number_ranges import find_range_problems
from pipelines.validation.problems import InvalidRecipe, Problem, find_nonpositive
from titan_ext.config import ModelDims
from titan_ext.quantization.config import QuantizationConfig


def validate_recipe(recipe: Recipe) -> None:
    """Check everything about a recipe that can be known without running it.

    Raises:
        InvalidRecipe: it breaks rules; the message lists every problem found.
    """
    problems = list(find_problems(recipe))
    if problems:
        raise InvalidRecipe(recipe.name, problems)


def check_model(model: ModelDims) -> None:
    """Check a model's dimensions on their own, as `mobilemoe info` takes them.

    Raises:
        RefusedInput: they break rules; the message lists every problem found, by the options of that command.
    """
    if problems := [
        *training_rules.find_model_problems(model),
        *training_rules.find_quantization_problems(QuantizationConfig(), model),
    ]:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        options = re.sub(r"\bmodel\.([a-z_.]+)", lambda field: "--" + field[1].replace("_", "-"), lines)
        raise RefusedInput(f"no model has these dimensions, {len(problems)} problem(s):\n{options}")


def find_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield every broken rule of the recipe, in the order of its fields; last the numbers that break no other rule."""
    if problems := list(find_key_problems(recipe)):
        yield from problems  # alone: other rules would quote the key
        return
    problems = list(find_rule_problems(recipe))
    # What follows computes with the numbers of these fields, so they must make sense.
    if not any(problem.field.startswith(("model.", "parallel.", "stages.", "cluster.")) for problem in problems):
        problems += find_memory_problems(recipe)
        if not any(problem.field == "data" for problem in problems):
            problems += find_epoch_problems(recipe)
    yield from problems
    named = {problem.field for problem in problems}
    yield from (problem for problem in find_range_problems(recipe) if problem.field not in named)


def find_rule_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield every broken rule of the files of rules, in the order of the recipe's fields."""
    yield from training_rules.find_model_problems(recipe.model)
    yield from training_rules.find_release_problems(recipe.model)
    yield from find_nonpositive("parallel", recipe.parallel, ("world_size", "expert_parallel", *training_rules.DEGREES))
    for name, stage in recipe.stages.items():
        numbers = ("seq_len", "global_batch_size", "local_batch_size", "learning_rate", "heldout_batches")
        yield from find_nonpositive(f"stages.{name}", stage, (*numbers, "heldout_interval", "log_interval"))
    yield from training_rules.find_parallel_problems(recipe.model, recipe.parallel)
    for name, stage in recipe.stages.items():
        yield from training_rules.find_stage_problems(name, stage, recipe)
    yield from training_rules.find_order_problems(recipe)
    yield from input_rules.find_start_problems(recipe)
    yield from input_rules.find_data_problems(recipe)
    yield from input_rules.find_evaluation_problems(recipe)
    yield from training_rules.find_quantization_problems(recipe.quantization, recipe.model)
    yield from training_rules.find_format_problems(recipe)
    yield from input_rules.find_cluster_problems(recipe)
