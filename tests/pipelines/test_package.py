"""The step `package`: every format of a run, what one failure leaves, and what a recipe may not ask for."""

import json
import os
from dataclasses import replace

import pytest

from core.checksums import verify_checksums
from eval.config import DeviceConfig
from eval.export.formats import FORMATS, PACKAGED, ExportOptions
from eval.export.hf_folder import write_hf_folder
from pipelines.recipe import Recipe
from pipelines.recipes import smoke
from pipelines.steps.package import list_outputs, package_on_worker
from pipelines.steps.profile import list_profile_outputs, profile_on_worker
from pipelines.validation.validate_recipe import find_problems
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.runtimes import run_card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the two artifacts that the formats are made from."""
    run = tmp_path_factory.mktemp("package") / "run"
    dims = replace(DIMS, n_layers=1)
    tokenizer = write_tokenizer(run / "data/tokenizer")
    write_hf_folder(random_tensors(dims), dims, tokenizer, run / "artifacts/bf16")
    quantize_folder(run / "artifacts/bf16", run / "artifacts/int4")
    (run / "manifest.json").write_text("{}")
    return run


def test_one_format_that_fails_is_named_and_the_others_are_kept(run, tmp_path):
    shown = []
    too_long = ExportOptions(device=DeviceConfig(context=100_000))
    with pytest.raises(RuntimeError, match="1 of 3 formats failed: executorch: RefusedInput: context is 100000"):
        package_on_worker(run, ("executorch", "gguf", "hf-native"), too_long, lambda *line: shown.append(line))
    artifacts = run / "artifacts"
    assert {path.name for path in artifacts.iterdir()} == {"bf16", "int4", "gguf", "bf16-native"}
    assert all(verify_checksums(artifacts / name) for name in ("gguf", "bf16-native"))
    assert [line[0] for line in shown] == ["executorch", "gguf", "hf-native", "formats"]
    kept = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()}
    package_on_worker(run, ("executorch",), ExportOptions(device=DeviceConfig(context=256)), lambda *_: None)
    assert verify_checksums(artifacts / "program") and (artifacts / "program/model.pte").is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert run_card(artifacts / "program", dict(os.environ), tmp_path).endswith("\n")
    profile_on_worker(artifacts / "program", run / "profile", [48], 1, lambda *_: None)
    profile = json.loads((run / "profile/profile.json").read_text())
    assert {m["context"] for m in profile["measurements"]} == {48} and profile["machine"]["threads"] == 1


def test_the_file_names_the_run_it_comes_from(run, tmp_path):
    import gguf

    package_on_worker(run, ("gguf",), ExportOptions(), lambda *_: None)  # replaces an earlier one
    fields = gguf.GGUFReader(run / "artifacts/gguf/model-q4_0.gguf").fields
    assert fields["general.base_model.0.name"].contents() == "run/artifacts/int4"


def test_every_format_has_a_folder_of_its_own():
    assert set(list_outputs(smoke.recipe())) == set(PACKAGED)
    assert len({entry.artifact for entry in FORMATS.values()}) == len(FORMATS)


def test_a_run_profiles_the_program_that_it_makes_where_there_is_room():
    recipe = smoke.recipe()
    assert list_profile_outputs(recipe) == ("profile",)
    for fields in ({"formats": ("gguf",)}, {"profile_contexts": ()}):
        assert list_profile_outputs(replace(recipe, export=replace(recipe.export, **fields))) == ()
    assert list_profile_outputs(replace(recipe, model=replace(recipe.model, max_seq_len=32))) == ()
    (fault,) = find_problems(replace(recipe, export=replace(recipe.export, profile_contexts=(512, 32))))
    assert str(fault).startswith("export.profile_contexts = 32: must be above 32")


def list_faults(recipe: Recipe) -> list[str]:
    return [str(problem) for problem in find_problems(recipe) if problem.field == "export.formats"]


@pytest.mark.parametrize(
    "change, formats, reason",
    [
        ({}, ("gguf", "onnx"), "onnx"),
        ({}, ("gguf", "bf16"), "bf16"),
        ({}, ("gguf", "gguf"), "named twice"),
        ({"model": {"shared_hidden": 80}}, ("hf-native",), "here it is 80 wide"),
        ({"quantization": {"expert_group_axis": "out"}}, ("gguf",), "along axis 'out'"),
        ({"quantization": {"expert_group_axis": "out"}}, ("executorch",), "along axis 'out'"),
        ({"quantization": {"group_size": 16}}, ("gguf",), "are [16]"),
    ],
)
def test_a_format_that_cannot_be_made_is_refused_before_the_run(change, formats, reason):
    recipe = smoke.recipe()
    for field, values in change.items():
        recipe = replace(recipe, **{field: replace(getattr(recipe, field), **values)})
    assert not list_faults(replace(recipe, export=replace(recipe.export, formats=())))
    (fault,) = list_faults(replace(recipe, export=replace(recipe.export, formats=formats)))
    assert reason in fault
