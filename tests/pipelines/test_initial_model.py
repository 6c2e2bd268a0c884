"""A run that starts from released weights: what its stages are given, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.stages import STAGES
from eval.export.hf_folder import write_hf_folder
from eval.export.tensor_files import read_config
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict
from pipelines.ray.cluster import Cluster
from pipelines.recipe import ClusterConfig
from pipelines.steps.context import Context
from pipelines.steps.export import export_models
from pipelines.steps.train import train_stage
from pipelines.validation.validate_recipe import find_problems
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer
from tests.pipelines.test_recipes import change
from tests.titan_ext.stage_data import write_data
from titan_ext.config import FLAVORS


@pytest.fixture
def released(tmp_path) -> Path:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return write_hf_folder(random_tensors(), DIMS, tokenizer, tmp_path / "released")


@pytest.fixture
def released_tiny(tmp_path) -> Path:
    """Write a folder with the dimensions of the smoke recipe."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    return write_hf_folder(random_tensors(FLAVORS["tiny"]), FLAVORS["tiny"], tokenizer, tmp_path / "released")


def without_training(recipe, *names: str):
    for name in names:
        recipe = change(recipe, f"stages.{name}.steps", 0)
    return recipe


def test_qat_alone_trains_the_released_model(smoke, released, tmp_path):
    """On Ray, two ranks: three stages pass the weights on, the fourth trains; the artifacts are of both models."""
    run = tmp_path / "run"
    write_data(run / "data", DIMS.vocab_size)
    write_tokenizer(run / "data/tokenizer")
    qat = replace(
        smoke.stages.qat, steps=2, warmup_steps=0, seq_len=64, global_batch_size=4, local_batch_size=2,
        mixture={"web": 0.6, "code": 0.4}, learning_rate=1e-3,
    )  # fmt: skip
    recipe = replace(without_training(smoke, "pretrain", "midtrain", "sft"), model=DIMS, initial_model=str(released))
    recipe = replace(recipe, stages=replace(recipe.stages, qat=qat), cluster=ClusterConfig(max_failures=0))
    with Cluster(recipe.cluster, run, world_size=2) as cluster:
        context = Context(recipe, run, cluster, print)
        left = [train_stage(context, name)["checkpoint"] for name in STAGES]
        export_models(context)
    assert left == ["stages/0_initial"] * 3 + ["stages/4_qat/checkpoint/step-2"]
    assert [path.name for path in sorted(run.glob("stages/*"))] == ["0_initial", "4_qat"]
    given, sft = (load_file(folder / "model.safetensors") for folder in (released, run / "artifacts/bf16"))
    assert all(torch.equal(given[name], sft[name]) for name in given)
    int4 = run / "artifacts/int4"
    trained = dequantize_state_dict(load_file(int4 / "model.safetensors"), read_config(int4))
    for name, tensor in given.items():
        if tensor.dim() > 1:  # a step of the INT4 grid and two of training away
            correlation = torch.corrcoef(torch.stack([tensor.float().flatten(), trained[name].float().flatten()]))[0, 1]
            assert correlation > 0.98, name


def test_released_weights_of_the_recipes_dimensions_are_accepted(smoke, released_tiny):
    recipe = replace(without_training(smoke, "pretrain", "midtrain"), initial_model=str(released_tiny))
    recipe = change(recipe, "data.tokenizer.path", str(released_tiny))
    assert list(find_problems(recipe)) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: spoil(folder / "model.safetensors"), "model.norm.weight holds NaN"),
    ],
)
def test_weights_that_cannot_be_imported_are_refused_before_the_data_is_made(damage, words, smoke, released_tiny):
    damage(released_tiny)
    recipe = replace(without_training(smoke, "pretrain"), initial_model=str(released_tiny))
    problems = {problem.field: str(problem) for problem in find_problems(recipe)}
    assert words in problems["initial_model"]


def test_another_tokenizer_than_the_initial_models_is_refused(smoke, released_tiny, tmp_path):
    other = shutil.copytree(released_tiny, tmp_path / "other")
    values = json.loads((other / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(values))
    recipe = replace(without_training(smoke, "pretrain"), initial_model=str(released_tiny))
    recipe = change(recipe, "data.tokenizer.path", str(other))
    (problem,) = find_problems(recipe)
    assert problem.field == "data.tokenizer.path"
    assert f"it gives 'A' the id {vocab['A']}, the tokenizer of initial_model {vocab['B']}" in str(problem)


def spoil(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] *= torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("path", "value", "field", "words"),
    [
        ("stages.sft.steps", 0, "stages.sft.steps", "--initial-model FOLDER"),
        ("initial_model", "/not/there", "initial_model", "has no config.json"),
        ("initial_model", "released", "data.tokenizer.path", "give the one it was trained with"),
        ("initial_model", "released", "model.d_model", "has 64"),
    ],
)
def test_a_start_that_cannot_be_is_refused(path, value, field, words, smoke, released):
    value = str(released) if value == "released" else value
    problems = {problem.field: str(problem) for problem in find_problems(change(smoke, path, value))}
    assert words in problems[field]


def test_only_the_first_stages_may_have_no_steps(smoke, released_tiny):
    for stage in ("sft", "qat"):
        recipe = replace(without_training(smoke, stage), initial_model=str(released_tiny))
        assert f"stages.{stage}.steps" in [problem.field for problem in find_problems(recipe)]
    recipe = replace(without_training(smoke, "pretrain", "midtrain", "sft"), initial_model=str(released_tiny))
    assert [problem.field for problem in find_problems(recipe)] == ["data.tokenizer.path"]
