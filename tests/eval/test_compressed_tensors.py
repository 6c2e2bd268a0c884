"""The compressed-tensors format: values by the format's own library, logits by transformers that reads through it."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from core.checksums import verify_checksums
from eval.export.glm4_moe import convert_tensors
from eval.export.hf_folder import write_hf_folder
from eval.export.source import open_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict
from pipelines.cli import DONE, REFUSED, main
from tests.eval.test_hf_native import measure_snr
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.runtimes import SCRIPTS, require_runtime, run_card
from titan_ext.quantization.config import QuantizationConfig

IDS = torch.randint(DIMS.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")
    quantize_folder(root / "bf16", root / "int4")
    command = ["export", str(root / "int4"), "--format", "compressed-tensors", "--out", str(root / "packed")]
    assert main(command) == DONE and verify_checksums(root / "packed") > 7
    return root


@pytest.fixture(scope="module", params=[("compressed_tensors",), ("compressed_tensors", "transformers5")], ids=len)
def computed(request, root):
    out = root / f"results-{len(request.param)}.pt"
    torch.save(IDS, root / "ids.pt")
    script = str(SCRIPTS / "compute_in_compressed_tensors.py")
    command = [sys.executable, script, str(root / "packed"), str(root / "ids.pt"), str(out)]
    ended = subprocess.run(command, env=require_runtime(*request.param), capture_output=True, text=True, cwd=root)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return torch.load(out)


def test_every_value_is_the_int4_folders(computed, root):
    opened = open_folder(root / "int4")
    expected = dict(convert_tensors(dequantize_state_dict(opened.tensors, opened.config).items(), opened.config))
    found = computed["weights"]
    assert len(found) == DIMS.n_layers * (4 + 3 + 3 * DIMS.n_experts)
    for name, weight in found.items():
        assert torch.equal(weight, expected[f"{name}.weight"]), name


def test_logits_are_those_of_our_modeling_code(computed, root):
    model = MobileMoEForCausalLM.from_pretrained(root / "int4").eval()
    rounded = ["embed_tokens"] + ["experts.gate_up_proj", "experts.down_proj"] * computed["version"].startswith("5.")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in rounded):
                weight.copy_(weight.bfloat16())
        expected = model(IDS).logits
    assert computed["class"] == "Glm4MoeForCausalLM"
    assert measure_snr(computed["logits"], expected) > 100


def test_the_folder_is_a_quarter_of_the_bfloat16_one_but_for_the_embedding(root):
    sizes = [(root / name / "model.safetensors").stat().st_size for name in ("packed", "bf16")]
    embedding = DIMS.vocab_size * DIMS.d_model * 2
    assert sizes[0] - embedding < 0.45 * (sizes[1] - embedding)  # headers are much of so small a file
    config = json.loads((root / "packed/config.json").read_text())
    assert config["model_type"] == "glm4_moe" and config["quantization_config"]["format"] == "pack-quantized"


def test_the_card_s_commands_run(root, tmp_path):
    assert run_card(root / "packed", require_runtime("compressed_tensors"), tmp_path).endswith("\n")


@pytest.mark.parametrize(
    "dims, quantization, reason",
    [
        (replace(DIMS, shared_hidden=96 + 32, expert_hidden=96), QuantizationConfig(), "here it is 128 wide"),
        (DIMS, QuantizationConfig(expert_group_axis="out"), "along axis 'out'"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(root, dims, quantization, reason, tmp_path, capsys):
    folder = write_hf_folder(random_tensors(dims), dims, root / "tokenizer", tmp_path / "bf16")
    folder = quantize_folder(folder, tmp_path / "int4", quantization)
    command = ["export", str(folder), "--format", "compressed-tensors", "--out", str(tmp_path / "packed")]
    assert main(command) == REFUSED
    assert reason in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "packed").exists()
