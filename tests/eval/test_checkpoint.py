"""From torchtitan's DCP checkpoint to Hugging Face folders: same logits, and the same INT4 numbers as in QAT."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval.hf_mobilemoe  # noqa: F401  registers the classes
from core.checksums import write_checksums
from core.errors import DamagedData
from eval.device.expert_op import declare
from eval.device.transformer import moe_transformer
from eval.device.weights import DeviceWeights
from eval.export.bf16 import export_bf16
from eval.export.dcp_checkpoint import CheckpointTensors, read_trained_weights
from eval.export.int4 import export_int4
from eval.export.source import open_folder, open_run_checkpoint
from eval.export.tensor_files import read_config
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict
from tests.eval.sharded_checkpoint import RANKS, build_state
from tests.eval.tiny_checkpoint import DIMS, write_tokenizer
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.qat import QATEmbedding, QATExperts, QATLinear, convert_to_qat, fake_quantize_weight


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def titan_model():
    torch.manual_seed(0)
    model = model_config(DIMS).build()
    model.init_states()
    with torch.no_grad():
        for block in model.layers.values():
            block.moe.expert_bias_E.normal_(0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(titan_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dcp") / "step-1"
    dcp.save(titan_model.state_dict(), checkpoint_id=folder, no_dist=True)
    return folder


def open_checkpoint(checkpoint, tokenizer_dir, quantization=None, precision="float32"):
    return open_run_checkpoint(checkpoint, DIMS, tokenizer_dir, quantization or QuantizationConfig(), precision)


def test_bf16_folder_gives_the_logits_of_the_trained_model(titan_model, checkpoint, tokenizer_dir, tmp_path):
    export_bf16(open_checkpoint(checkpoint, tokenizer_dir, precision="bfloat16"), tmp_path / "bf16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    tokens = torch.randint(0, DIMS.vocab_size, (2, 20))
    with torch.no_grad():
        ours = titan_model(tokens, positions=torch.arange(20).repeat(2, 1))
        theirs = exported(tokens).logits
    # The folder rounds the weights to bf16: eight bits of each factor.
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.9995
    exact = AutoModelForCausalLM.from_config(read_config(tmp_path / "bf16"), dtype=torch.float32).eval()
    exact.load_state_dict(CheckpointTensors(checkpoint, DIMS), strict=False)
    exact.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(exact(tokens).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("axis", "group"), [("in", None), ("out", None), ("in", 16)])
def test_int4_folder_holds_exactly_what_qat_trained_on(titan_model, checkpoint, tokenizer_dir, tmp_path, axis, group):
    quantization = QuantizationConfig(expert_group_axis=axis, expert_group_size=group)
    export_int4(open_checkpoint(checkpoint, tokenizer_dir, quantization), tmp_path / "int4")
    stored = dequantize_state_dict(load_file(tmp_path / "int4/model.safetensors"), read_config(tmp_path / "int4"))

    qat = convert_to_qat(model_config(DIMS), quantization).build()
    qat.load_state_dict(titan_model.state_dict())
    seen = dict(qat.state_dict())
    for path, module in qat.named_modules():
        if isinstance(module, (QATLinear, QATEmbedding)):
            seen[f"{path}.weight"] = fake_quantize_weight(module.weight, module.group_size)
        elif isinstance(module, QATExperts):
            for name, weight in zip(("w1_EFD", "w2_EDF", "w3_EFD"), module.local_weights(), strict=True):
                seen[f"{path}.{name}"] = weight
    trained_on = MobileMoEStateDictAdapter(qat.config, None).to_hf(seen)
    assert stored.keys() == trained_on.keys()
    different = [
        name
        for name, weight in trained_on.items()
        if "norm" not in name and "expert_bias" not in name and not torch.equal(stored[name], weight)
    ]
    assert different == []


def test_folders_of_a_run_load_in_bfloat16_by_themselves(checkpoint, tokenizer_dir, tmp_path):
    """The evaluation loads artifacts with dtype "auto", which config.json decides."""
    source = open_checkpoint(checkpoint, tokenizer_dir)
    for export, out in ((export_int4, tmp_path / "int4"), (export_bf16, tmp_path / "bf16")):
        model = AutoModelForCausalLM.from_pretrained(export(source, out), dtype="auto")
        assert model.dtype == torch.bfloat16


def test_refuses_an_unfinished_checkpoint_and_another_model(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no finished DCP checkpoint"):
        CheckpointTensors(tmp_path, DIMS)
    wide = dataclasses.replace(DIMS, expert_hidden=64)
    with pytest.raises(ValueError, match=r"w1_EFD is \[8, 32, 64\], the model's dimensions make it \[8, 64, 64\]"):
        CheckpointTensors(checkpoint, wide)
    deep = dataclasses.replace(DIMS, n_layers=3)
    with pytest.raises(ValueError, match=r"layers\.2\..* is missing"):
        CheckpointTensors(checkpoint, deep)


def test_refuses_a_checkpoint_that_has_changed_since_it_was_written(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    write_checksums(tmp_path / "copy")
    read_trained_weights(tmp_path / "copy", DIMS, "float32")
    (file, *_) = sorted((tmp_path / "copy").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedData, match=r"distcp has SHA-256 \w+, SHA256SUMS says"):
        read_trained_weights(tmp_path / "copy", DIMS, "float32")


def test_the_device_program_gets_the_numbers_of_the_int4_folder(checkpoint, tokenizer_dir, tmp_path):
    source = open_checkpoint(checkpoint, tokenizer_dir, precision="bfloat16")
    export_int4(source, tmp_path / "int4")
    folder, direct = DeviceWeights(open_folder(tmp_path / "int4")), DeviceWeights(source)
    layer = "model.layers.1."
    for name in ("model.embed_tokens.weight", f"{layer}self_attn.q_proj.weight"):
        for a, b in zip(folder.read_matrix(name), direct.read_matrix(name), strict=True):
            assert torch.equal(a, b)
    experts = f"{layer}feed_forward.experts.gate_up_proj"
    for a, b in zip(folder.read_expert_matrices(experts), direct.read_expert_matrices(experts), strict=True):
        assert torch.equal(a, b)
    for name in ("feed_forward.router.weight", "feed_forward.expert_bias", "input_layernorm.weight"):
        assert torch.equal(folder.read_unquantized(layer + name), direct.read_unquantized(layer + name))


def test_a_checkpoint_grouped_along_the_output_is_refused_for_the_device(checkpoint, tokenizer_dir):
    with pytest.raises(ValueError, match="expert_group_axis"):
        DeviceWeights(open_checkpoint(checkpoint, tokenizer_dir, QuantizationConfig(expert_group_axis="out")))


@torch.no_grad()
@pytest.mark.parametrize(("expert_op", "decibels"), [("fast", 60), ("stock", 25)])
def test_qat_and_the_device_compute_the_same(titan_model, checkpoint, tokenizer_dir, expert_op, decibels):
    """Training's forward with fake-quantized weights and activations, and the modules that are traced for the device.

    Both round weights and activations to the same grids; sums in another order put an activation on the edge of two
    integers to the other one now and then. The stock op on x86 leaves the experts' activations unrounded.
    """
    declare()
    qat = convert_to_qat(model_config(DIMS), QuantizationConfig()).build()
    qat.load_state_dict(titan_model.state_dict())
    tokens = torch.randint(8, DIMS.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    trained = qat.eval()(tokens, positions=torch.arange(40)[None])[0, -1]
    weights = DeviceWeights(open_checkpoint(checkpoint, tokenizer_dir))
    device = moe_transformer(weights, 64, expert_op)(tokens, {"input_pos": torch.tensor([0])})[0]
    assert 20 * torch.log10(trained.norm() / (device - trained).norm()) > decibels


def test_a_sharded_checkpoint_is_read_tensor_by_tensor(tmp_path):
    folder, state = tmp_path / "step-1", build_state()
    command = [sys.executable, "-m", "tests.eval.sharded_checkpoint", str(folder), str(tmp_path / "rendezvous")]
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(folder.glob("*.distcp"))) == RANKS
    # The reference: all of the checkpoint at once, and the adapter's own way to the released names.
    whole = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    dcp.load(whole, checkpoint_id=folder, no_dist=True)
    expected = MobileMoEStateDictAdapter(model_config(DIMS), None).to_hf(whole)
    found = CheckpointTensors(folder, DIMS)
    assert list(found) == list(expected) and len(found) == len(expected)
    for name in reversed(list(expected)):
        assert torch.equal(found[name], expected[name]) and found[name].is_contiguous(), name
    rounded = read_trained_weights(folder, DIMS, "bfloat16")
    for name, tensor in expected.items():
        wanted = tensor if name.endswith(("router.weight", "expert_bias")) else tensor.bfloat16().float()
        assert torch.equal(rounded[name], wanted), name
