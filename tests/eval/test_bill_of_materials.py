"""Tests of eval.export.bill_of_materials against CycloneDX's own schema."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from core.errors import DamagedData
from eval.export import bill_of_materials
from eval.export.artifact_folder import new_folder
from eval.export.bill_of_materials import BILL

COMMIT = "0123456789012345678901234567890123456789"
RECIPE = {
    "name": "tiny", "seed": 3, "model": {"d_model": 64}, "initial_model": "/home/someone/models/base",
    "data": {"corpora": ["a", "b"], "tokenizer": {"path": "/home/someone/tokenizer"}},
    "cluster": {"log_folder": "/home/someone/logs"},
}  # fmt: skip
CORPORA = {
    "a": {
        "domain": "web", "licence": "ODC-BY-1.0", "non_commercial": False, "read": 10, "kept": 8,
        "address": "hf://datasets/org/a@0123/data", "pattern": "*.parquet", "content": "00ff",
    },
    "b": {
        "domain": "chat", "licence": "each repository's own, permissive ones only", "non_commercial": True, "read": 2,
        "kept": 2, "installed": {"reasoning-gym": "0.1.25"},
    },
    "c": {
        "domain": "math", "licence": "MIT OR Apache-2.0", "non_commercial": False, "read": 2, "kept": 1,
        "package": "items", "version": "1.2", "archive_sha256": "ab" * 32, "address": "/home/someone/texts",
    },
}  # fmt: skip


def write_run(run: Path) -> Path:
    """Write the two manifests of a run; return a folder in it."""
    versions = {"torch": version("torch"), "not-installed-here": "1.0"}
    (run / "data/tokenizer").mkdir(parents=True)
    manifest = {"recipe": RECIPE, "versions": versions, "git_commit": COMMIT, "host": "vm", "created": "2026-01-01"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "data/data_manifest.json").write_text(json.dumps({"corpora": CORPORA}))
    return run / "data/tokenizer"


def read_bill(out: Path, made_from: Path | None) -> dict:
    with new_folder(out, made_from) as folder:
        (folder / "weights").write_text("0")
    text = (out / BILL).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def properties(component: dict) -> dict[str, str]:
    return {entry["name"].removeprefix("mobilemoe:"): entry["value"] for entry in component.get("properties", [])}


def test_a_bill_names_recipe_commit_libraries_and_corpora(tmp_path):
    bill = read_bill(tmp_path / "int4", write_run(tmp_path / "run"))
    model = bill["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "int4")
    recipe = json.loads(properties(model)["recipe"])
    assert recipe["seed"] == 3 and recipe["data"]["corpora"] == ["a", "b"] and recipe["initial_model"] == "base"
    parts = {component["bom-ref"]: component for component in bill["components"]}
    assert parts.keys() == {
        "mobilemoe", "library-torch", "library-not-installed-here", "corpus-a", "corpus-b", "corpus-c"
    }  # fmt: skip
    assert properties(parts["mobilemoe"]) == {"git_commit": COMMIT}
    assert parts["library-torch"]["purl"] == f"pkg:pypi/torch@{version('torch')}"
    assert "BSD-3-Clause" in parts["library-torch"]["licenses"][0]["expression"]
    assert parts["corpus-a"]["licenses"] == [{"license": {"id": "ODC-By-1.0"}}]
    assert parts["corpus-b"]["licenses"] == [{"license": {"name": CORPORA["b"]["licence"]}}]
    assert parts["corpus-c"]["licenses"] == [{"expression": "MIT OR Apache-2.0"}]
    assert parts["corpus-a"]["externalReferences"] == [{"type": "distribution", "url": CORPORA["a"]["address"]}]
    assert parts["corpus-a"]["version"] == "00ff"
    assert properties(parts["corpus-b"])["non_commercial"] == "true"
    assert json.loads(properties(parts["corpus-b"])["installed"]) == {"reasoning-gym": "0.1.25"}
    assert properties(parts["corpus-c"])["archive_sha256"] == "ab" * 32


def test_a_bill_says_nothing_of_the_machine_or_the_day(tmp_path):
    text = json.dumps(read_bill(tmp_path / "int4", write_run(tmp_path / "run")))
    for word in ("someone", "vm", "2026", str(tmp_path)):
        assert word not in text.replace(COMMIT, "")


def test_the_same_run_gives_the_same_bytes_and_another_commit_others(tmp_path):
    made_from = write_run(tmp_path / "run")
    first, again = (read_bill(tmp_path / name / "int4", made_from) for name in ("x", "y"))
    assert first == again and first["serialNumber"].startswith("urn:uuid:")
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(manifest.read_text().replace(COMMIT, COMMIT[::-1]))
    assert read_bill(tmp_path / "z/int4", made_from)["serialNumber"] != first["serialNumber"]


def test_an_artifact_made_of_an_artifact_passes_its_bill_on(tmp_path):
    first = read_bill(tmp_path / "int4", write_run(tmp_path / "run"))
    second = read_bill(tmp_path / "gguf", tmp_path / "int4")
    assert second["metadata"]["component"] == first["metadata"]["component"] | {"name": "gguf"}
    assert second["components"] == first["components"]
    assert second["serialNumber"] != first["serialNumber"]


@pytest.mark.parametrize("with_folder", [False, True])
def test_without_a_run_the_program_alone_is_named(tmp_path, with_folder):
    bill = read_bill(tmp_path / "bf16", tmp_path if with_folder else None)
    assert [component["name"] for component in bill["components"]] == ["mobilemoe"]
    assert "properties" not in bill["metadata"]["component"]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"name": "a web extension"}'])
def test_a_manifest_that_is_no_runs_is_left_alone(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    bill = read_bill(tmp_path / "new", tmp_path / "models/x")
    assert [component["name"] for component in bill["components"]] == ["mobilemoe"]


FOREIGN = {
    "of another program": '{"bomFormat": "CycloneDX", "specVersion": "1.5", "components": []}',
    "without a type": '{"metadata": {"component": {"name": "x"}}}',
    "an empty one": "{}",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_bill_of_others_is_passed_on_in_our_form(tmp_path, text):
    (tmp_path / BILL).write_text(text)
    assert read_bill(tmp_path / "new", tmp_path)["metadata"]["component"]["name"] == "new"


@pytest.mark.parametrize("text", ["[]", "5", '{"components": 3}', '{"metadata": []}', '{"components": [{}]}', "large"])
def test_what_is_no_bill_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr(bill_of_materials, "LARGEST_BILL", 1000)
    (tmp_path / BILL).write_text('{"version": 1}' + " " * 1000 if text == "large" else text)
    with pytest.raises(DamagedData, match="export again from the run, or delete it"):
        read_bill(tmp_path / "new", tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("damaged", ["run/manifest.json", "run/data/data_manifest.json", f"int4/{BILL}"])
def test_a_damaged_source_is_refused_by_name(tmp_path, damaged):
    made_from = write_run(tmp_path / "run")
    read_bill(tmp_path / "int4", made_from)
    (tmp_path / damaged).write_text("{")
    with pytest.raises(DamagedData, match=Path(damaged).name):
        read_bill(tmp_path / "new", tmp_path / "int4" if damaged.startswith("int4") else made_from)
    assert not (tmp_path / "new").exists()
