"""The hf-native format: stock transformers computes what our modeling code does, and the way back loses no bit."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeForCausalLM

from core.checksums import verify_checksums
from core.errors import RefusedInput
from eval.export.glm4_moe import to_half_split, to_interleaved
from eval.export.hf_folder import write_hf_folder
from eval.export.hf_native import export_native
from eval.export.import_hf import import_folder
from eval.export.source import open_folder
from eval.export.stored_scales import SCALES_FILE
from eval.export.tensor_files import TensorFiles, check_checkpoint
from eval.hf_mobilemoe import MobileMoEForCausalLM
from pipelines.cli import DONE, REFUSED, main
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.runtimes import require_runtime, run_card


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")


@pytest.fixture(scope="module")
def native(bf16):
    out = bf16.with_name("native")
    assert main(["export", str(bf16), "--format", "hf-native", "--out", str(out)]) == DONE
    return out


def measure_snr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal-to-noise ratio in decibels."""
    return float(10 * torch.log10(expected.pow(2).sum() / (found - expected).pow(2).sum()))


def load_pair(native, bf16, dtype=torch.float32):
    own = MobileMoEForCausalLM.from_pretrained(bf16, dtype=dtype).eval()
    stock = AutoModelForCausalLM.from_pretrained(native, dtype=dtype).eval()
    assert type(stock) is Glm4MoeForCausalLM
    return stock, own


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_our_modeling_code_with_padding_on_either_side(native, bf16, side):
    stock, own = load_pair(native, bf16)
    lengths, longest = (23, 60, 200), 200  # 64 is where the scaling of rotary positions begins
    ids = torch.full((3, longest), stock.config.pad_token_id)
    mask = torch.zeros(3, longest, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[row, place] = torch.randint(DIMS.vocab_size, (n,), generator=torch.Generator().manual_seed(row))
        mask[row, place] = 1
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (stock, own))
    assert measure_snr(found, expected) > 100


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_equal_with_and_without_cache(native, bf16, use_cache):
    stock, own = load_pair(native, bf16)
    tokenizer = AutoTokenizer.from_pretrained(native)
    batch = tokenizer(["the quick brown", "over the lazy dog the quick brown fox"], padding=True, return_tensors="pt")
    found, expected = (
        model.generate(**batch, max_new_tokens=48, do_sample=False, use_cache=use_cache) for model in (stock, own)
    )
    assert found.shape[1] > batch["input_ids"].shape[1]
    torch.testing.assert_close(found, expected)


def test_the_folder_needs_no_code_and_brings_all_files(native, bf16):
    names = {path.name for path in native.iterdir()}
    assert not [name for name in names if name.endswith(".py")]
    kept = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "README.md"}
    assert kept < names and verify_checksums(native) == len(names) - 1
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (native / name).read_bytes() == (bf16 / name).read_bytes()
    config = json.loads((native / "config.json").read_text())
    assert config["model_type"] == "glm4_moe" and "auto_map" not in config and config["dtype"] == "bfloat16"


def test_rows_change_places_as_rotary_pairs_do():
    weight = torch.arange(8.0).unsqueeze(1)  # two heads of four channels
    assert to_half_split(weight, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    torch.testing.assert_close(to_interleaved(to_half_split(weight, 4), 4), weight)


# --- back again -----------------------------------------------------------------------------------------------------


def same(first, second) -> bool:
    a, b = dict(TensorFiles(first)), dict(TensorFiles(second))
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("way", ["import", "export"])
def test_the_way_back_gives_the_same_bits(native, bf16, way, tmp_path):
    folder = native
    if way == "import":
        assert main(["import", str(native), "--out", str(tmp_path / "dcp")]) == DONE
        folder = tmp_path / "dcp"
    assert main(["export", str(folder), "--format", "bf16", "--out", str(tmp_path / "again")]) == DONE
    assert same(tmp_path / "again", bf16)
    before, after = (json.loads((path / "config.json").read_text()) for path in (bf16, tmp_path / "again"))
    assert after == before


def test_an_int4_grid_survives_the_native_folder(bf16, tmp_path):
    int4 = quantize_folder(bf16, tmp_path / "int4")
    export_native(open_folder(int4), tmp_path / "native")
    assert (tmp_path / "native" / SCALES_FILE).is_file()
    assert same(quantize_folder(tmp_path / "native", tmp_path / "again"), int4)


def test_a_folder_that_transformers_saved_again_is_read(native, bf16, tmp_path):
    AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(native).save_pretrained(tmp_path / "saved")
    config = check_checkpoint(tmp_path / "saved")
    assert config.num_local_experts == DIMS.n_experts
    tensors = open_folder(tmp_path / "saved").tensors
    for name, tensor in open_folder(bf16).tensors.items():
        assert torch.equal(tensors[name], tensor.float()), name


def test_many_files_have_an_index(bf16, native, tmp_path):
    export_native(open_folder(bf16), tmp_path / "native", max_shard_bytes=50_000)
    assert len(list((tmp_path / "native").glob("model-*-of-*.safetensors"))) > 2
    assert same(tmp_path / "native", native)
    import_folder(tmp_path / "native", tmp_path / "dcp")
    stock, again = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (native, tmp_path / "native"))
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), again.parameters(), strict=True))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims, reason",
    [
        (replace(DIMS, shared_hidden=80), "here it is 80 wide and a routed one 32"),
        (replace(DIMS, shared_hidden=16), "here it is 16 wide and a routed one 32"),
        (replace(DIMS, n_experts=1, top_k=1), "chooses among two experts or more"),
    ],
)
def test_a_model_that_the_class_cannot_express_is_refused(bf16, dims, reason, tmp_path, capsys):
    folder = write_hf_folder(random_tensors(dims), dims, bf16.with_name("tokenizer"), tmp_path / "bf16")
    out = tmp_path / "native"
    assert main(["export", str(folder), "--format", "hf-native", "--out", str(out)]) == REFUSED
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "key, value",
    [
        ("first_k_dense_replace", 1), ("first_k_dense_replace", None), ("n_group", 2), ("norm_topk_prob", False),
        ("use_qk_norm", False), ("partial_rotary_factor", 0.5), ("attention_bias", True), ("n_routed_experts", "8"),
        ("tie_word_embeddings", False), ("num_nextn_predict_layers", 1), ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}), ("rms_norm_eps", None), ("hidden_act", "gelu"),
    ],
)  # fmt: skip
def test_a_glm4_moe_that_is_no_mobilemoe_is_refused(native, key, value, tmp_path):
    shutil.copytree(native, tmp_path / "copy")
    config = json.loads((native / "config.json").read_text()) | {key: value}
    if value is None:
        del config[key]
    (tmp_path / "copy/config.json").write_text(json.dumps(config))
    with pytest.raises(RefusedInput, match=f"{re.escape(str(tmp_path))}.*{key}"):
        open_folder(tmp_path / "copy")


@pytest.mark.parametrize("fault", ["norm", "missing", "shape"])
def test_tensors_that_are_no_mobilemoes_are_refused(native, fault, tmp_path):
    shutil.copytree(native, tmp_path / "copy")
    tensors = load_file(native / "model.safetensors")
    name = "model.layers.1.self_attn.k_norm.weight"
    if fault == "norm":
        tensors[name][3] = 1.5
    elif fault == "missing":
        del tensors[name]
    else:
        name = "model.layers.0.mlp.experts.7.down_proj.weight"
        tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, tmp_path / "copy/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RefusedInput, match=re.escape(name)):
        open_folder(tmp_path / "copy")


@pytest.mark.parametrize("runtime", ["", "transformers5"])
@pytest.mark.parametrize("name", ["native", "bf16"])
def test_the_card_s_commands_run(native, bf16, name, runtime, tmp_path):
    environment = require_runtime(runtime) if runtime else dict(os.environ)
    assert run_card(native if name == "native" else bf16, environment, tmp_path).endswith("\n")
