"""The scales beside float weights that came from INT4: foreign or damaged ones are refused, an import keeps them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eval.export.bf16 import export_bf16
from eval.export.hf_folder import write_hf_folder
from eval.export.import_hf import import_folder
from eval.export.source import open_folder
from eval.export.stored_scales import SCALES_FILE
from tests.eval.readings import TINY
from tests.eval.tiny_checkpoint import quantize_folder, random_tensors, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig


@pytest.fixture(scope="module")
def int4(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stored_scales")
    write_tokenizer(root / "tokenizer")
    folder = write_hf_folder(random_tensors(TINY), TINY, root / "tokenizer", root / "whole")
    return quantize_folder(folder, root / "int4", QuantizationConfig())


SCALES_DAMAGES = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:50]), "is damaged"),
    "no layout": (lambda path: save_file(load_file(path), path), "is damaged"),
    "of another model": (
        lambda path: save_file({"x": torch.ones(2)}, path, metadata={"quantization": stated_layout(path)}),
        "it is of another model",
    ),
}


def stated_layout(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["quantization"]


@pytest.mark.parametrize("name", SCALES_DAMAGES)
def test_stored_scales_are_those_of_the_weights(name, int4, tmp_path):
    folder = export_bf16(open_folder(int4), tmp_path / "bf16")
    change, words = SCALES_DAMAGES[name]
    change(folder / SCALES_FILE)
    for read in (open_folder, lambda folder: import_folder(folder, tmp_path / "dcp")):
        with pytest.raises(ValueError, match=words):
            read(folder)


def test_the_grid_of_a_bf16_folder_survives_an_import(int4, tmp_path):
    """INT4 to bf16 to a checkpoint and back to INT4: the scales come along, as they do without the import."""
    import_folder(export_bf16(open_folder(int4), tmp_path / "bf16"), tmp_path / "dcp")
    again = quantize_folder(tmp_path / "dcp", tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (int4, again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_stored_scales_beside_int4_are_refused(int4, tmp_path):
    folder = shutil.copytree(int4, tmp_path / "int4")
    shutil.copytree(export_bf16(open_folder(int4), tmp_path / "bf16") / "int4", folder / "int4")
    with pytest.raises(ValueError, match="lies beside weights that are INT4"):
        open_folder(folder)
