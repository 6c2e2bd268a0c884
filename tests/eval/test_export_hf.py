"""Exported folders: what lies in them, that transformers loads them with and without our package, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.checksums import verify_checksums, write_checksums
from core.errors import DamagedData
from data.tokens import tokenizer as own_tokenizer
from eval.export.dimensions import config_from_dims
from eval.export.hf_folder import write_hf_folder
from eval.export.tensor_files import TensorFiles
from eval.hf_mobilemoe import MobileMoEForCausalLM, MobileMoEModel
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bf16(tmp_path_factory, tokenizer_dir) -> Path:
    """Given as a generator in an order of its own, in shards of 64 KiB."""
    tensors = ((name, tensor) for name, tensor in sorted(random_tensors().items(), reverse=True))
    return write_hf_folder(tensors, DIMS, tokenizer_dir, tmp_path_factory.mktemp("hf") / "bf16", max_shard_bytes=65536)


@pytest.fixture(scope="module")
def int4(bf16) -> Path:
    return quantize_folder(bf16, bf16.with_name("int4"), QuantizationConfig())


def test_config_has_the_released_keys(bf16):
    config = json.loads((bf16 / "config.json").read_text())
    released = {
        "model_type": "mobilemoe", "architectures": ["MobileMoEForCausalLM"], "hidden_size": 64,
        "intermediate_size": 32, "intermediate_size_mlp": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "num_local_experts": 8, "num_experts_per_tok": 4,
        "interleave_moe_layer_step": 1, "no_rope_layers": [1, 1], "layer_types": ["full_attention"] * 2,
        "use_qk_norm": True, "tie_word_embeddings": True, "attention_bias": False, "routed_scaling_factor": 2.5,
        "norm_topk_prob": True, "vocab_size": 320,
    }  # fmt: skip
    assert {key: config.get(key) for key in released} == released
    assert config["rope_scaling"]["factor"] == 16.0 and config["dtype"] == "bfloat16"
    assert "quantization" not in config


def test_shards_index_and_values(bf16):
    shards = sorted(bf16.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((bf16 / "model.safetensors.index.json").read_text())
    found = {name: (tensor, file.name) for file in shards for name, tensor in load_file(file).items()}
    assert index["weight_map"] == {name: file for name, (_, file) in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor, _ in found.values())
    for name, tensor in random_tensors().items():
        exact = name.endswith(("router.weight", "expert_bias"))
        assert torch.equal(found[name][0], tensor if exact else tensor.bfloat16()), name


def test_tokenizer_and_generation_config(bf16, tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(bf16)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False)
    assert text == AutoTokenizer.from_pretrained(tokenizer_dir).apply_chat_template(
        [{"role": "user", "content": "fox"}], tokenize=False
    )
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", DIMS.max_seq_len)
    generation = MobileMoEForCausalLM.from_pretrained(bf16).generation_config
    assert tokenizer.convert_ids_to_tokens(generation.eos_token_id) == [
        "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
    ]  # fmt: skip
    assert generation.bos_token_id == tokenizer.bos_token_id
    assert generation.pad_token_id == tokenizer.pad_token_id


def test_the_pipelines_own_tokenizer_feeds_the_model(tmp_path):
    """Two texts of different lengths and a chat turn, as model cards show it; as trained, token types come along."""
    trained = own_tokenizer.train(iter(["the quick brown fox " * 50, "lazy dogs jump over the " * 50]), DIMS.vocab_size)
    own_tokenizer.save(trained, tmp_path / "tokenizer")
    folder = write_hf_folder(random_tensors(), DIMS, tmp_path / "tokenizer", tmp_path / "bf16")
    model, exported = MobileMoEForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["the quick", "the quick brown fox jumps over"]
    turn = [{"role": "user", "content": "lazy dogs"}]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    batch = exported(texts, return_tensors="pt", padding=True)
    chat = exported.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**batch, **options)
    for row, text in enumerate(texts):
        alone = model.generate(**exported(text, return_tensors="pt"), **options)
        assert torch.equal(generated[row, -4:], alone[0, -4:])
    assert model.generate(**chat, **options).shape[1] == chat.input_ids.shape[1] + 4
    with pytest.raises(ValueError, match="token_type_ids"):
        model.generate(**own_tokenizer.load(tmp_path / "tokenizer")(texts[0], return_tensors="pt"), **options)


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, out in (sys.argv[1:3], sys.argv[3:5]):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert not any(name.split(".")[0] in ("eval", "titan_ext") for name in sys.modules)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(["the quick brown", "a dog"], return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
    turn = [{"role": "user", "content": "the quick brown"}]
    chat = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**chat, max_new_tokens=2).shape[1] > chat.input_ids.shape[1]
    torch.save({"logits": model(batch.input_ids[:1]).logits, "generated": generated}, out)
    if folder.endswith("int4"):
        packed = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, keep_int4=True)
        torch.testing.assert_close(packed(batch.input_ids).logits, model(batch.input_ids).logits)
"""


def test_fresh_process_with_remote_code_equals_registered_classes(bf16, int4, tmp_path):
    """The folder is all a user needs: a process outside the project, offline, with an empty module cache."""
    (tmp_path / "script.py").write_text(REMOTE)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", str(bf16), "bf16.pt", str(int4), "int4.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in (bf16, int4):
        theirs = torch.load(tmp_path / f"{folder.name}.pt")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(model) is MobileMoEForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batch = tokenizer(["the quick brown", "a dog"], return_tensors="pt", padding=True)
        torch.testing.assert_close(model(batch.input_ids[:1]).logits, theirs["logits"])
        generated = model.generate(**batch, max_new_tokens=8, do_sample=False)
        assert torch.equal(generated, theirs["generated"])
        text = tokenizer.batch_decode(generated, skip_special_tokens=True)[0]
        assert text.startswith("the quick brown") and len(text) > len("the quick brown")


@pytest.mark.parametrize("kind", ["bf16", "int4"])
def test_from_pretrained_takes_the_usual_options(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    options = {"attn_implementation": "eager", "use_cache": False, "dtype": "bfloat16", "output_loading_info": True}
    model, info = MobileMoEForCausalLM.from_pretrained(folder, **options)
    assert model.config._attn_implementation == "eager" and model.config.use_cache is False
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    assert model.name_or_path == str(folder)
    tokens = torch.arange(8, 30)[None]
    base = MobileMoEModel.from_pretrained(folder)
    whole = MobileMoEForCausalLM.from_pretrained(folder)
    assert torch.equal(base(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "generation_config.json").unlink()
    assert torch.equal(MobileMoEForCausalLM.from_pretrained(bare)(tokens).logits, whole(tokens).logits)


def damage(folder: Path, change) -> None:
    """Rewrite the shard that holds the last layer's k_proj with `change` applied to its tensors."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if any("layers.1.self_attn.k_proj" in name for name in tensors):
            save_file(change(tensors), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: x for n, x in t.items() if "layers.1.self_attn.k_proj" not in n}, r"k_proj.* is missing"),
        (lambda t: {n: x[:-1] if "layers.1.self_attn.k_proj" in n else x for n, x in t.items()}, r"k_proj.*has shape"),
        (lambda t: t | {"model.extra.weight": torch.ones(2)}, r"model\.extra\.weight \[2\] is not a tensor"),
    ],
)
def test_damaged_checkpoint_is_refused(kind, change, message, request, tokenizer_dir, tmp_path):
    source = write_hf_folder(random_tensors(), DIMS, tokenizer_dir, tmp_path / "bf16")
    if kind == "int4":
        source = quantize_folder(source, tmp_path / "int4", QuantizationConfig())
    damage(source, change)
    with pytest.raises(ValueError, match=message):
        MobileMoEForCausalLM.from_pretrained(source)


def test_missing_shard_is_refused(bf16, tmp_path):
    for file in bf16.iterdir():
        if file.name != "model-00002-of-" + sorted(bf16.glob("*.safetensors"))[0].name[-17:]:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"model-00002.*is missing"):
        list(TensorFiles(tmp_path))
    with pytest.raises(DamagedData, match="model-00002"):
        verify_checksums(tmp_path)


def test_checksums(bf16, tmp_path):
    assert verify_checksums(bf16) == len([p for p in bf16.rglob("*") if p.is_file()]) - 1
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=bf16).returncode == 0
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("x")
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        verify_checksums(tmp_path)
    write_checksums(tmp_path)
    (tmp_path / "sub" / "a").write_text("y")
    with pytest.raises(DamagedData, match=r"sub/a has SHA-256"):
        verify_checksums(tmp_path)
    (tmp_path / "sub" / "a").unlink()
    with pytest.raises(DamagedData, match=r"sub/a is listed"):
        verify_checksums(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight \[64\] is missing"),
        (lambda t: t.update({"lm_head.weight": torch.ones(320, 64)}), r"lm_head\.weight .*not a tensor of this model"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), r"model\.norm\.weight \[63\]: expected \[64\]"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight holds NaN"),
    ],
)
def test_refused_state_dict_leaves_nothing(change, message, tokenizer_dir, tmp_path):
    tensors = random_tensors()
    change(tensors)
    with pytest.raises(ValueError, match=message):
        write_hf_folder(tensors, DIMS, tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_hf_folder(random_tensors(), DIMS, tokenizer_dir, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the failed attempt's remains were not taken over"


def test_earlier_export_is_replaced_and_other_folders_are_not(tokenizer_dir, tmp_path):
    out = write_hf_folder(random_tensors(seed=1), DIMS, tokenizer_dir, tmp_path / "out")
    (out / "stale").write_text("")
    write_hf_folder(random_tensors(seed=2), DIMS, tokenizer_dir, out)
    assert not (out / "stale").exists()
    weight = dict(TensorFiles(out))["model.embed_tokens.weight"]
    assert torch.equal(weight, random_tensors(seed=2)["model.embed_tokens.weight"].bfloat16())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not an earlier export"):
        write_hf_folder(random_tensors(), DIMS, tokenizer_dir, tmp_path / "mine")


def test_unsuitable_tokenizer_is_refused(tmp_path, tokenizer_dir):
    plain = write_tokenizer(tmp_path / "plain", chat_template=None)
    with pytest.raises(ValueError, match="no chat template"):
        write_hf_folder(random_tensors(), DIMS, plain, tmp_path / "out")
    (tmp_path / "lacking").mkdir()
    for file in tokenizer_dir.iterdir():
        (tmp_path / "lacking" / file.name).write_text(file.read_text().replace("<|eot_id|>", "<|other|>"))
    with pytest.raises(ValueError, match=r"lacks the special tokens \['<\|eot_id\|>'\]"):
        write_hf_folder(random_tensors(), DIMS, tmp_path / "lacking", tmp_path / "out")


def test_float32_folder_is_exact(tokenizer_dir, tmp_path):
    out = write_hf_folder(random_tensors(), DIMS, tokenizer_dir, tmp_path / "out", dtype=torch.float32)
    written = dict(TensorFiles(out))
    assert all(torch.equal(written[name], tensor) for name, tensor in random_tensors().items())
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        write_hf_folder(random_tensors(), DIMS, tokenizer_dir, tmp_path / "half", dtype=torch.float16)


def test_extra_config_keys_are_written(tokenizer_dir, tmp_path):
    extra = {"training_stage": "sft", "rope_scaling": None}
    out = write_hf_folder(random_tensors(), DIMS, tokenizer_dir, tmp_path / "out", extra_config=extra)
    config = json.loads((out / "config.json").read_text())
    assert config["training_stage"] == "sft" and config["rope_scaling"] is None
    assert config_from_dims(DIMS).rope_scaling["rope_type"] == "llama3"
