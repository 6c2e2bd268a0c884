"""The mlx format: every value through MLX's own dequantization, and mlx-lm against our modeling code."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from core.checksums import verify_checksums
from eval.export.glm4_moe import to_interleaved
from eval.export.hf_folder import write_hf_folder
from eval.export.source import open_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict
from pipelines.cli import DONE, REFUSED, main
from tests.eval.test_hf_native import measure_snr
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.runtimes import SCRIPTS, require_runtime, run_card
from titan_ext.quantization.config import QuantizationConfig

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
IDS = torch.randint(DIMS.vocab_size, (200,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mlx")
    write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")
    quantize_folder(root / "bf16", root / "int4")
    assert main(["export", str(root / "int4"), "--format", "mlx", "--out", str(root / "mlx")]) == DONE
    assert verify_checksums(root / "mlx") > 6
    return root


@pytest.fixture(scope="module")
def computed(root):
    environment = require_runtime("mlx", "transformers5")
    (root / "inputs.json").write_text(json.dumps({"messages": MESSAGES, "ids": IDS}))
    script = str(SCRIPTS / "compute_in_mlx.py")
    # mlx-lm takes a path for a pattern, so it runs inside of the folder.
    command = [sys.executable, script, ".", str(root / "inputs.json"), str(root / "results.npz")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root / "mlx")
    assert ended.returncode == 0, ended.stderr[-3000:]
    with np.load(root / "results.npz") as found:
        return {name: torch.tensor(found[name]) for name in found.files}


def test_every_value_is_the_int4_folders(computed, root):
    opened = open_folder(root / "int4")
    expected = dequantize_state_dict(opened.tensors, opened.config)
    seen = set()
    for name, tensor in computed.items():
        if not name.startswith("model."):
            continue
        seen.add(name)
        if "switch_mlp" in name:
            layer, part = name.partition("mlp.")[0] + "feed_forward.experts.", name.rsplit(".", 1)[1]
            gate, up = expected[f"{layer}gate_up_proj"].transpose(1, 2).chunk(2, dim=1)
            down = expected[f"{layer}down_proj"].transpose(1, 2)
            assert torch.equal(tensor, {"gate_proj": gate, "up_proj": up, "down_proj": down}[part]), name
            continue
        if name.endswith(("q_proj", "k_proj")):
            tensor = to_interleaved(tensor, DIMS.head_dim)
        own = name.replace("mlp.shared_experts", "feed_forward.shared_expert")
        assert torch.equal(tensor, expected[f"{own}.weight"]), name
    assert len(seen) == 1 + DIMS.n_layers * (4 + 3 + 3)


def test_logits_are_those_of_our_modeling_code(computed, root):
    with torch.no_grad():
        expected = MobileMoEForCausalLM.from_pretrained(root / "int4").eval()(torch.tensor([IDS])).logits[0]
    assert measure_snr(computed["logits_f32"], expected) > 100
    assert measure_snr(computed["logits_bf16"], expected) > 10  # random weights; a router that is near a tie flips


def test_chat_and_ends_are_the_tokenizers(computed, root):
    tokenizer = AutoTokenizer.from_pretrained(root / "bf16")
    assert computed["prompt"].tolist() == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"])
    assert computed["ends"].tolist() == sorted(ends)


def test_an_unquantized_checkpoint_gives_the_same_groups(root, tmp_path):
    assert main(["export", str(root / "bf16"), "--format", "mlx", "--out", str(tmp_path / "mlx")]) == DONE
    first, second = (folder / "model.safetensors" for folder in (root / "mlx", tmp_path / "mlx"))
    from safetensors.torch import load_file

    a, b = load_file(first), load_file(second)
    # INT4 folders hold the expert bias in bfloat16.
    assert all(torch.equal(a[name], b[name]) for name in a if "correction_bias" not in name) and a.keys() == b.keys()


def test_the_card_s_commands_run(root, tmp_path):
    assert run_card(root / "mlx", require_runtime("mlx", "transformers5"), tmp_path).endswith("\n")


@pytest.mark.parametrize(
    "dims, quantization, reason",
    [
        (replace(DIMS, top_k=1), QuantizationConfig(), "does not normalize the weight of a single expert"),
        (replace(DIMS, shared_hidden=96 + 16), QuantizationConfig(group_size=16), "here it is 112 wide"),
        (DIMS, QuantizationConfig(expert_group_axis="out"), "along axis 'out'"),
    ],
)
def test_what_mlx_does_not_have_is_refused(root, dims, quantization, reason, tmp_path, capsys):
    folder = write_hf_folder(random_tensors(dims), dims, root / "tokenizer", tmp_path / "bf16")
    folder = quantize_folder(folder, tmp_path / "int4", quantization)
    assert main(["export", str(folder), "--format", "mlx", "--out", str(tmp_path / "mlx")]) == REFUSED
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "mlx").exists()
