"""`mobilemoe export` from folders: what came in goes out again in either layout, an INT4 grid bit for bit."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.checksums import verify_checksums
from eval.config import ExportConfig
from eval.device.weights import DeviceWeights
from eval.export.hf_folder import write_hf_folder
from eval.export.source import open_folder
from eval.export.stored_scales import SCALES_FILE
from eval.export.tensor_files import TensorFiles
from pipelines.cli import DONE, REFUSED, main
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")


@pytest.fixture(scope="module", params=["in", "out"])
def int4(request, bf16):
    """A folder that another program made: any values, and scales that are not max|w| / 7.5 and not all bfloat16."""
    folder = quantize_folder(
        bf16, bf16.with_name(f"int4_{request.param}"), QuantizationConfig(expert_group_axis=request.param)
    )
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("qweight"):
            tensors[name] = torch.randint(0, 256, tensor.shape, dtype=torch.uint8, generator=generator)
        elif name.endswith("scale"):
            tensors[name] = (tensor * (0.5 + torch.rand(tensor.shape, generator=generator))).half()
    tensors["model.embed_tokens.weight_scale"][3] = 0.0
    tensors["model.embed_tokens.qweight"][3] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    scales = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("scale")])
    assert not torch.equal(scales.bfloat16().half(), scales)
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def same(first, second) -> bool:
    a, b = dict(TensorFiles(first)), dict(TensorFiles(second))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_the_model_card_names_the_licence_of_the_code(bf16):
    assert "Apache-2.0" in (bf16 / "README.md").read_text()
    assert "Apache License 2.0" in (bf16 / "LICENSE-NOTE.txt").read_text()


@pytest.mark.parametrize("way", ["import", "bf16", "import, bf16"])
def test_a_foreign_int4_folder_comes_back_bit_for_bit(way, int4, tmp_path):
    folder = int4
    if "import" in way:
        assert run("import", folder, "--out", tmp_path / "dcp") == DONE
        folder = tmp_path / "dcp"
    if "bf16" in way:
        assert run("export", folder, "--format", "bf16", "--out", tmp_path / "bf16") == DONE
        folder = tmp_path / "bf16"
        assert (folder / SCALES_FILE).is_file() and TensorFiles(folder)["model.norm.weight"].dtype == torch.bfloat16
    assert run("export", folder, "--format", "int4", "--out", tmp_path / "again") == DONE
    assert same(tmp_path / "again", int4) and verify_checksums(tmp_path / "again") > 7
    before, after = (json.loads((f / "config.json").read_text())["quantization"] for f in (int4, tmp_path / "again"))
    assert after == before


def test_an_imported_bf16_folder_is_exported_as_the_folder_is(bf16, tmp_path):
    assert run("import", bf16, "--out", tmp_path / "dcp") == DONE
    for name, source in (("direct", bf16), ("imported", tmp_path / "dcp")):
        for layout in ("bf16", "int4"):
            assert run("export", source, "--format", layout, "--out", tmp_path / name / layout) == DONE
    assert same(tmp_path / "imported/bf16", bf16) and same(tmp_path / "direct/bf16", bf16)
    assert same(tmp_path / "imported/int4", tmp_path / "direct/int4")
    assert same(tmp_path / "direct/int4", quantize_folder(bf16, tmp_path / "int4", QuantizationConfig()))
    # And so is the device program, which reads the same numbers.
    name = "model.layers.1.feed_forward.experts.down_proj"
    imported, direct = (
        DeviceWeights(open_folder(f)).read_expert_matrices(name) for f in (tmp_path / "dcp", tmp_path / "direct/int4")
    )
    assert all(torch.equal(a, b) for a, b in zip(imported, direct, strict=True))


def test_inside_a_run_its_recipe_says_the_layout(int4, bf16, tmp_path):
    """A run's initial model was imported, too: its tokenizer and groups are the run's."""
    folder = tmp_path / "run"
    assert run("import", int4, "--out", folder / "stages/0_initial") == DONE
    shutil.copytree(bf16.with_name("tokenizer"), folder / "data/tokenizer")
    recipe = {
        "model": asdict(DIMS), "export": asdict(ExportConfig()), "parallel": {"precision": "bfloat16"},
        "quantization": asdict(QuantizationConfig(expert_group_axis="in", expert_group_size=16)),
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"recipe": recipe}))
    assert run("export", folder / "stages/0_initial", "--format", "int4", "--out", tmp_path / "out") == DONE
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization"]["expert_group_size"] == 16


def test_what_cannot_be_exported_is_refused(bf16, int4, tmp_path, capsys):
    assert run("export", int4, "--format", "int4", "--out", tmp_path / "out") == REFUSED
    assert "is quantized already" in capsys.readouterr().err
    bare = shutil.copytree(bf16, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert run("import", bare, "--out", tmp_path / "dcp") == DONE
    assert run("export", tmp_path / "dcp", "--format", "bf16", "--out", tmp_path / "out") == REFUSED
    assert "has no tokenizer.json; copy the model's tokenizer there" in capsys.readouterr().err
    (tmp_path / "dcp/config.json").unlink()
    assert run("export", tmp_path / "dcp", "--format", "bf16", "--out", tmp_path / "out") == REFUSED
    assert "or one that `mobilemoe import` wrote" in capsys.readouterr().err
    assert run("export", bf16, "--format", "int4", "--out", bf16) == REFUSED
    assert "name a folder that does not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
