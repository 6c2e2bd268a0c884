"""The INT4 layout against torchao's mapping and a per-value packer, and INT4 -> BF16 -> INT4 bit for bit."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

from core.checksums import verify_checksums
from eval.export.dimensions import config_from_dims
from eval.export.hf_folder import write_hf_folder
from eval.export.int4 import derive_scale, pack_int4, quantize_tensors
from eval.export.sizes import int4_bytes
from eval.export.stored_scales import SCALES_FILE
from eval.export.tensor_files import TensorFiles
from eval.hf_mobilemoe import MobileMoEForCausalLM, MobileMoEModel, packed_mobilemoe
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_int4, dequantize_state_dict, packed_tensors, unpack_int4
from eval.hf_mobilemoe.configuration_mobilemoe import describe_quantization
from tests.eval.tiny_checkpoint import (
    DIMS,
    dequantize_folder,
    quantize_folder,
    random_tensors,
    write_int4_folder,
    write_tokenizer,
)
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import quantize_int4
from titan_ext.quantization.qat import fake_quantize_weight

CONFIG = config_from_dims(DIMS)
AXES = ["in", "out"]


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    root = tmp_path_factory.mktemp("int4")
    return write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")


def quantize_state_dict(tensors, axis="in"):
    return dict(quantize_tensors(tensors.items(), config_from_dims(DIMS, quantization=describe_quantization(32, axis))))


def file_bytes(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@given(st.integers(0, 2), st.data())
def test_packing_is_low_nibble_first_two_complement(dim, data):
    shape = [2 * n if i == dim else n for i, n in enumerate(data.draw(st.tuples(*[st.integers(1, 3)] * 3)))]
    q = torch.from_numpy(data.draw(arrays(np.int8, shape, elements=st.integers(-8, 7))))
    packed = pack_int4(q, dim)
    pairs = zip(q.movedim(dim, -1).flatten()[::2].tolist(), q.movedim(dim, -1).flatten()[1::2].tolist(), strict=True)
    assert packed.movedim(dim, -1).flatten().tolist() == [(low % 16) + 16 * (high % 16) for low, high in pairs]
    assert torch.equal(unpack_int4(packed, dim), q)


@given(arrays(np.float32, (3, 64), elements=st.floats(-1e5, 1e5, width=32)))
def test_scale_is_exact_in_both_half_precisions(values):
    w = torch.from_numpy(values)
    scale = derive_scale(w, 1, 32)
    assert scale.dtype == torch.float16 and scale.isfinite().all() and (scale > 0).all()
    assert torch.equal(scale.float().bfloat16().float(), scale.float())
    wanted = (w.unflatten(1, (2, 32)).abs().amax(2) / 7.5).clamp(min=2.0**-24)
    # bfloat16 rounds by at most 2^-8 of the value; below 2^-14 float16 has steps of 2^-24.
    assert ((scale.float() - wanted).abs() <= wanted * 2.0**-8 + 2.0**-25).all()


def test_all_zero_group_has_a_defined_scale():
    zeros = torch.zeros(2, 32)
    scale = derive_scale(zeros, 1, 32)
    q = quantize_int4(zeros, scale, 1, 32)
    assert q.count_nonzero() == 0 and scale.tolist() == [[2.0**-24], [2.0**-24]]


def test_scales_and_values_equal_torchao():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    w[0, 3] = -w[0, :32].abs().max() * 2  # a group whose largest weight is negative reaches -8
    scale, zero = choose_qparams_affine(
        w, MappingType.SYMMETRIC, (1, 32), torch.int8, -8, 7, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8
    )
    expected = quantize_affine(w, (1, 32), scale.float(), zero, torch.int8, -8, 7)
    own_scale = derive_scale(w, 1, 32)
    q = quantize_int4(w, own_scale, 1, 32)
    assert torch.equal(own_scale.bfloat16(), scale)
    assert torch.equal(q, expected)
    assert q.min() == -8 and q.max() == 7


@pytest.mark.parametrize("axis", AXES)
def test_layout_is_the_documented_one(axis):
    packed = quantize_state_dict(random_tensors(), axis)
    layer = {n.removeprefix("model.layers.0."): (list(t.shape), t.dtype) for n, t in packed.items() if ".0." in n}
    byte, half = torch.uint8, torch.float16
    experts = {
        "in": {"gate_up_qweight": [8, 32, 64], "gate_up_scale": [8, 2, 64],
               "down_qweight": [8, 16, 64], "down_scale": [8, 1, 64]},
        "out": {"gate_up_qweight": [8, 64, 32], "gate_up_scale": [8, 64, 2],
                "down_qweight": [8, 32, 32], "down_scale": [8, 32, 2]},
    }[axis]  # fmt: skip
    assert layer["self_attn.k_proj.qweight"] == ([32, 32], byte)
    assert layer["self_attn.k_proj.weight_scale"] == ([32, 2], half)
    assert layer["feed_forward.shared_expert.down_proj.weight_scale"] == ([64, 4], half)
    for name, shape in experts.items():
        assert layer[f"feed_forward.experts.{name}"] == (shape, byte if "qweight" in name else half)
    assert layer["feed_forward.router.weight"] == ([8, 64], torch.float32)
    assert layer["feed_forward.expert_bias"] == ([8], torch.bfloat16)
    assert layer["input_layernorm.weight"] == ([64], torch.bfloat16)
    assert packed["model.embed_tokens.qweight"].shape == (320, 32)
    assert len(layer) == 3 + 1 + 2 * (4 + 2 + 3)


@pytest.mark.parametrize("axis", AXES)
def test_each_value_is_within_half_a_step(axis):
    """Value by value over one expert: the group of w[e, i, o] runs along `axis`, and q * scale is near w."""
    weights, f = random_tensors(), DIMS.expert_hidden
    packed = quantize_state_dict(weights, axis)
    config = config_from_dims(DIMS, quantization=describe_quantization(32, axis))
    back = dequantize_state_dict(packed, config)
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    for i in range(DIMS.d_model):
        for o in range(0, 2 * f, 5):
            group = weights[name][3, 32 * (i // 32) : 32 * (i // 32) + 32, o]
            if axis == "out":
                group = weights[name][3, i, 32 * (o // 32) : 32 * (o // 32) + 32]
            step = group.abs().max() / 7.5  # the largest weight is 7.5 of them, clamped to 7; the scale is rounded too
            assert (back[name][3, i, o] - weights[name][3, i, o]).abs() <= 0.53 * step
    for name in ("model.layers.0.feed_forward.router.weight", "model.layers.1.feed_forward.router.weight"):
        assert torch.equal(back[name], weights[name])


@given(
    arrays(np.int8, (4, 32), elements=st.integers(-8, 7)),
    arrays(np.float32, (4, 1), elements=st.floats(2.0**-24, 60000.0, width=32)),
)
def test_stored_scales_recover_every_value(q, raw_scale):
    """For any INT4 content, also one that max|w| / 7.5 would never give, through bfloat16 and through float32."""
    q = torch.from_numpy(q)
    scale = torch.from_numpy(raw_scale).bfloat16().to(torch.float16).clamp(min=2.0**-24)
    w = dequantize_int4(q, scale, 1, 32)
    assert torch.equal(w.double(), q.double() * scale.double())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quantize_int4(w.to(dtype), scale, 1, 32), q)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int4_to_float_and_back_changes_no_bit(axis, dtype, bf16, tmp_path):
    quantization = QuantizationConfig(expert_group_axis=axis)
    int4 = quantize_folder(bf16, tmp_path / "int4", quantization, max_shard_bytes=1 << 15)
    assert len(file_bytes(int4)) > 1
    floats = dequantize_folder(int4, tmp_path / "floats", dtype)
    assert (floats / SCALES_FILE).is_file() and verify_checksums(floats) > 0
    again = quantize_folder(floats, tmp_path / "again", quantization, max_shard_bytes=1 << 15)
    first, second = dict(TensorFiles(int4)), dict(TensorFiles(again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    assert (int4 / "config.json").read_text().replace('"bfloat16"', "") == (again / "config.json").read_text().replace(
        '"bfloat16"', ""
    ).replace('"float32"', "")


def test_stored_scales_that_do_not_fit_are_refused(bf16, tmp_path):
    floats = dequantize_folder(quantize_folder(bf16, tmp_path / "int4", QuantizationConfig()), tmp_path / "floats")
    (floats / "model.safetensors").write_bytes((bf16 / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight does not lie on the stored scales; remove"):
        quantize_folder(floats, tmp_path / "again", QuantizationConfig())
    quantize_folder(floats, tmp_path / "other_layout", QuantizationConfig(expert_group_axis="out"))
    (floats / SCALES_FILE).unlink()
    quantize_folder(floats, tmp_path / "again", QuantizationConfig())
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "int4")


@pytest.mark.parametrize("axis", AXES)
def test_written_weights_are_those_the_qat_forward_saw(axis, tmp_path):
    """From float32 master weights, whatever their size: the loaded model has training's fake-quantized values."""
    weights = random_tensors()
    weights["model.layers.0.self_attn.q_proj.weight"] *= torch.logspace(-10, 3, 64)[:, None]
    int4 = write_int4_folder(
        weights, DIMS, write_tokenizer(tmp_path / "tokenizer"), tmp_path / "int4",
        QuantizationConfig(expert_group_axis=axis), extra_config={"training_stage": "qat"},
    )  # fmt: skip
    loaded = MobileMoEForCausalLM.from_pretrained(int4).state_dict()
    for name, p in packed_tensors(CONFIG, describe_quantization(32, axis)).items():
        assert torch.equal(loaded[name], fake_quantize_weight(weights[name], 32, p.dim)), name
    assert json.loads((int4 / "config.json").read_text())["training_stage"] == "qat"


@pytest.mark.parametrize("axis", AXES)
def test_int4_folder_loads_as_its_dequantized_folder(axis, bf16, tmp_path):
    """from_pretrained on the INT4 files, in float32, is exactly the model of the float32 folder made from them."""
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig(expert_group_axis=axis))
    floats = dequantize_folder(int4, tmp_path / "floats", torch.float32)
    model = MobileMoEForCausalLM.from_pretrained(int4)
    tokens = torch.arange(8, 40)[None]
    assert torch.equal(model(tokens).logits, MobileMoEForCausalLM.from_pretrained(floats)(tokens).logits)
    assert model.config.quantization is None and model.generation_config.pad_token_id is not None
    low = MobileMoEForCausalLM.from_pretrained(int4, dtype="auto")
    assert low.dtype == torch.bfloat16 and low.model.layers[0].feed_forward.router.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(MobileMoEForCausalLM.from_pretrained(tmp_path / "saved")(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("axis", AXES)
def test_packed_weights_give_the_same_numbers(axis, bf16, tmp_path, monkeypatch):
    """keep_int4 against the model dequantized when it is loaded: weights bit for bit, logits, generated text."""
    monkeypatch.setattr(packed_mobilemoe, "HEAD_ROWS", 100)
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig(expert_group_axis=axis))
    floats = MobileMoEForCausalLM.from_pretrained(int4)
    packed = MobileMoEForCausalLM.from_pretrained(int4, keep_int4=True)
    down, weight = (m.model.layers[1].feed_forward.experts.down_proj for m in (packed, floats))
    assert len(down) == 8 and torch.equal(down[3], weight[3]) and torch.equal(down[2:4], weight[2:4])
    tokens = torch.arange(8, 40)[None]
    torch.testing.assert_close(packed(tokens).logits, floats(tokens).logits, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(packed.generate(tokens, **options), floats.generate(tokens, **options))
    assert packed.generation_config.pad_token_id == floats.generation_config.pad_token_id is not None
    decoder = MobileMoEModel.from_pretrained(int4, keep_int4=True)
    torch.testing.assert_close(decoder(tokens)[0], floats.model(tokens)[0], rtol=1e-5, atol=1e-5)
    assert sum(t.nbytes for t in packed.state_dict().values()) < 1.1 * 2 * int4_bytes(DIMS), "the head is listed twice"
    low = MobileMoEForCausalLM.from_pretrained(int4, keep_int4=True, dtype="auto")
    assert low(tokens).logits.dtype == torch.bfloat16
    assert low.model.layers[0].feed_forward.router.weight.dtype == torch.float32


def test_packed_weights_and_what_does_not_go_with_them(bf16, tmp_path):
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig())
    with pytest.raises(ValueError, match=r"keep_int4: .* is not quantized"):
        MobileMoEForCausalLM.from_pretrained(bf16, keep_int4=True)
    with pytest.raises(ValueError, match="keep_int4 does not go together with device_map"):
        MobileMoEForCausalLM.from_pretrained(int4, keep_int4=True, device_map="cpu")
    with pytest.raises(ValueError, match="is INT4 and cannot lie on disk; export it to bf16"):
        MobileMoEForCausalLM.from_pretrained(int4, device_map={"": "disk"}, offload_folder=str(tmp_path / "disk"))
    packed = MobileMoEForCausalLM.from_pretrained(int4, keep_int4=True)
    with pytest.raises(ValueError, match="copy the folder they come from"):
        packed.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="without keep_int4 to resize"):
        packed.resize_token_embeddings(400)
    floats = MobileMoEForCausalLM.from_pretrained(int4)
    assert floats.resize_token_embeddings(400).weight.shape[0] == 400


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_weights_follow_a_cast(dtype, bf16, tmp_path):
    """A cast changes the floats alone: values and scales stay, and another cast gives the first numbers again."""
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig())
    model = MobileMoEForCausalLM.from_pretrained(int4, keep_int4=True)
    weight, tokens = model.model.layers[0].self_attn.q_proj.weight, torch.arange(8, 40)[None]
    scale, logits = weight.scale.clone(), model(tokens).logits
    model.to(dtype)
    assert model(tokens).logits.dtype == weight[:].dtype == dtype
    assert weight.scale.dtype == torch.float16 and torch.equal(weight.scale, scale)
    torch.testing.assert_close(model.float()(tokens).logits, logits, rtol=1e-2, atol=1e-2)


def test_config_states_the_quantization(bf16, tmp_path):
    for axis, spelled in (("in", "in (dim 1 of [E, in, out])"), ("out", "out (last dim of [E, in, out])")):
        int4 = quantize_folder(bf16, tmp_path / axis, QuantizationConfig(expert_group_axis=axis))
        assert json.loads((int4 / "config.json").read_text())["quantization"] == {
            "format": "mobilemoe-int4-g32", "group_size": 32, "embedding_group_size": 32, "qmin": -8, "qmax": 7,
            "symmetric": True, "packed": True, "scale_dtype": "float16",
            "linear_group_axis": "in (last dim of [out, in])", "expert_group_axis": spelled,
        }  # fmt: skip
        assert verify_checksums(int4) >= 7


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (QuantizationConfig(group_size=48), r"embed_tokens\.weight \[320, 64\] cannot be quantized.*group size 48"),
        (QuantizationConfig(group_size=64), r"down_proj \[8, 32, 64\] cannot be quantized: dimension 1"),
        (QuantizationConfig(expert_group_axis="rows"), r"expert_group_axis is 'rows'; choose one of \['in', 'out'\]"),
    ],
)
def test_layout_that_does_not_fit_is_refused(quantization, message, bf16, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantize_folder(bf16, tmp_path / "int4", quantization)
    assert list(tmp_path.iterdir()) == []


def test_wrong_kind_of_folder_is_refused(bf16, tmp_path):
    int4 = quantize_folder(bf16, tmp_path / "int4", QuantizationConfig())
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_folder(int4, tmp_path / "again", QuantizationConfig())
    with pytest.raises(ValueError, match=r"has no config\.json"):
        quantize_folder(tmp_path, tmp_path / "again", QuantizationConfig())


def test_scale_overflow_names_the_tensor():
    weights = random_tensors()
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight: a weight of 1e\+06"):
        quantize_state_dict(weights)
