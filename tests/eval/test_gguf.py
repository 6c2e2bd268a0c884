"""The gguf format: every value of the file against the checkpoint, and llama.cpp against our modeling code."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from core.checksums import verify_checksums
from core.errors import RefusedInput
from data.tokens import tokenizer as trained_tokenizer
from eval.config import GgufConfig
from eval.device import prompts
from eval.export.gguf_file import encode_q4_0, export_gguf
from eval.export.gguf_tokenizer import find_word_splitter
from eval.export.glm4_moe import to_interleaved
from eval.export.hf_folder import write_hf_folder
from eval.export.source import open_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_state_dict
from pipelines.cli import DONE, REFUSED, main
from tests.eval.test_hf_native import measure_snr
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.runtimes import SCRIPTS, require_runtime, run_card
from titan_ext.config import RopeScaling
from titan_ext.quantization.config import QuantizationConfig

TYPES = ("f32", "f16", "bf16", "q4_0")
MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
TEXTS = [
    "the quick brown fox jumps over the lazy dog", "", " \n\n  tabs\tand  spaces ", "It's 12345 o'clock, I'LL go!",
    "naïve café — 東京 🙂 ﷽ \u200d", "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "a" * 300,
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")
    quantize_folder(root / "bf16", root / "int4")
    return root


@pytest.fixture(scope="module")
def files(root):
    """Source and type -> path of the file."""
    found = {}
    for source in ("bf16", "int4"):
        for name in TYPES:
            out = root / f"{source}_{name}"
            command = ["export", str(root / source), "--format", "gguf", "--type", name, "--out", str(out)]
            assert main(command) == DONE
            assert verify_checksums(out) == 4  # the file, the model card, the licences, the bill of materials
            found[source, name] = out / f"model-{name}.gguf"
    return found


def read_values(path: Path) -> dict[str, torch.Tensor]:
    """Read a file with the gguf package, every tensor as float32 by our names and with our axes."""
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    values = {n: torch.tensor(np.array(gguf.quants.dequantize(t.data, t.tensor_type))) for n, t in stored.items()}
    tensors = {
        "model.embed_tokens.weight": values.pop("token_embd.weight"),
        "model.norm.weight": values.pop("output_norm.weight"),
    }
    own = {
        "attn_norm.weight": "input_layernorm.weight", "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate_inp.weight": "feed_forward.router.weight", "exp_probs_b.bias": "feed_forward.expert_bias",
    }  # fmt: skip
    own |= {f"ffn_{n}_shexp.weight": f"feed_forward.shared_expert.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert torch.equal(values.pop("output.weight"), tensors["model.embed_tokens.weight"])
    values.pop("rope_freqs.weight")
    for i in range(DIMS.n_layers):
        theirs, ours = f"blk.{i}.", f"model.layers.{i}."
        for name in "qk":
            assert torch.equal(values.pop(f"{theirs}attn_{name}_norm.weight"), torch.ones(DIMS.head_dim))
            rows = values.pop(f"{theirs}attn_{name}.weight")
            tensors[f"{ours}self_attn.{name}_proj.weight"] = to_interleaved(rows, DIMS.head_dim)
        gate, up, down = (values.pop(f"{theirs}ffn_{n}_exps.weight") for n in ("gate", "up", "down"))
        tensors[f"{ours}feed_forward.experts.gate_up_proj"] = torch.cat([gate, up], dim=1).transpose(1, 2)
        tensors[f"{ours}feed_forward.experts.down_proj"] = down.transpose(1, 2)
        tensors |= {ours + name: values.pop(theirs + key) for key, name in own.items()}
    assert not values
    return tensors


@pytest.mark.parametrize("source", ["bf16", "int4"])
@pytest.mark.parametrize("name", ["f32", "bf16", "q4_0"])
def test_every_value_of_the_file_is_the_checkpoints(files, root, source, name):
    opened = open_folder(root / ("int4" if name == "q4_0" else source))
    expected = dict(opened.tensors)
    if opened.is_int4:
        expected = dequantize_state_dict(opened.tensors, opened.config)
    found = read_values(files[source, name])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        if name == "bf16" and tensor.dim() > 1 and "router" not in key:
            tensor = tensor.bfloat16()
        if name == "q4_0" and source == "bf16" and "expert_bias" in key:
            continue  # INT4 folders hold it in bfloat16
        assert torch.equal(found[key], tensor.float()), key


def test_an_int4_checkpoint_and_the_one_it_came_from_give_one_file(files):
    first, second = (gguf.GGUFReader(files[source, "q4_0"]).tensors for source in ("bf16", "int4"))
    for a, b in zip(first, second, strict=True):
        if "exp_probs_b" not in a.name:  # INT4 folders hold the expert bias in bfloat16
            assert a.name == b.name and np.array_equal(a.data, b.data)


def test_wider_groups_become_blocks_of_the_same_scale(root, tmp_path):
    quantize_folder(root / "bf16", tmp_path / "int4", QuantizationConfig(group_size=64, expert_group_size=32))
    export_gguf(open_folder(tmp_path / "int4"), tmp_path / "gguf", GgufConfig())
    opened = open_folder(tmp_path / "int4")
    found = read_values(tmp_path / "gguf/model-q4_0.gguf")
    for key, tensor in dequantize_state_dict(opened.tensors, opened.config).items():
        assert torch.equal(found[key], tensor), key


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.int8, (3, 64), elements=st.integers(-8, 7)),
    arrays(np.float16, (3, 2), elements=st.floats(2**-24, 60000, width=16)),
)
def test_blocks_are_those_of_the_gguf_package(q, scale):
    blocks = encode_q4_0(torch.tensor(q), torch.tensor(scale)).numpy()
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(found, q.astype(np.float32) * scale.astype(np.float32).repeat(32, axis=1))


def test_the_metadata_says_what_the_model_is(files):
    fields = {name: field.contents() for name, field in gguf.GGUFReader(files["int4", "q4_0"]).fields.items()}
    assert fields["general.license.link"] == "LICENSE-NOTE.txt"
    assert fields["general.base_model.0.name"] == "int4"
    assert "quantization-aware training" in fields["general.quantized_by"]
    assert fields["exaone-moe.expert_count"] == DIMS.n_experts
    assert fields["exaone-moe.expert_shared_feed_forward_length"] == DIMS.shared_hidden
    assert fields["exaone-moe.rope.freq_base"] == DIMS.rope_theta
    assert len(fields["tokenizer.ggml.tokens"]) == DIMS.vocab_size


# --- llama.cpp ------------------------------------------------------------------------------------------------------


def run_llama_cpp(path: Path, inputs: dict, out: Path) -> dict:
    out.with_suffix(".json").write_text(json.dumps(inputs))
    script = SCRIPTS / "compute_in_llama_cpp.py"
    command = [sys.executable, str(script), str(path), str(out.with_suffix(".json")), str(out)]
    ended = subprocess.run(command, env=require_runtime("llama_cpp"), capture_output=True, text=True, cwd=out.parent)
    assert ended.returncode == 0, ended.stderr[-3000:]
    with np.load(out) as found:
        arrays_found = {name: torch.tensor(found[name]) for name in found.files if name != "rest"}
        return arrays_found | json.loads(str(found["rest"]))


def make_inputs(vocab_size: int, lengths=(200, 7), context: int = 256) -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return {"context": context, "ids": ids, "texts": TEXTS, "messages": MESSAGES, "new_tokens": 32}


@pytest.fixture(scope="module", params=[("bf16", "f32"), ("int4", "f32")], ids="_".join)
def computed(request, files, root):
    """Return what llama.cpp gave, the model in this process, and what was asked."""
    source, name = request.param
    inputs = make_inputs(DIMS.vocab_size)
    found = run_llama_cpp(files[source, name], inputs, root / f"{source}_{name}.npz")
    return found, MobileMoEForCausalLM.from_pretrained(root / source).eval(), inputs


def test_logits_and_greedy_text_are_those_of_our_modeling_code(computed):
    found, model, inputs = computed
    for i, ids in enumerate(inputs["ids"]):
        batch = torch.tensor([ids])
        with torch.no_grad():
            expected = model(batch).logits[0]
        assert measure_snr(found[f"logits_{i}"], expected) > 110
        greedy = model.generate(
            batch, attention_mask=torch.ones_like(batch), max_new_tokens=inputs["new_tokens"], do_sample=False,
            eos_token_id=[],
        )  # fmt: skip
        assert found[f"greedy_{i}"] == greedy[0, len(ids) :].tolist()


def test_tokens_are_the_tokenizers(computed, root):
    found, *_ = computed
    tokenizer = AutoTokenizer.from_pretrained(root / "bf16")
    # This miniature's tokenizer adds no begin-of-text; llama.cpp does.
    assert found["tokens"] == [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in TEXTS]


def test_a_band_of_rotary_scaling_and_any_shared_width(root, tmp_path):
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)
    dims = replace(DIMS, shared_hidden=96 + 16, rope_scaling=scaling)
    write_hf_folder(random_tensors(dims), dims, root / "tokenizer", tmp_path / "bf16")
    export_gguf(open_folder(tmp_path / "bf16"), tmp_path / "gguf", GgufConfig("f32"))
    inputs = make_inputs(dims.vocab_size)
    found = run_llama_cpp(tmp_path / "gguf/model-f32.gguf", inputs, tmp_path / "found.npz")
    with torch.no_grad():
        expected = MobileMoEForCausalLM.from_pretrained(tmp_path / "bf16").eval()(torch.tensor(inputs["ids"][:1]))
    assert measure_snr(found["logits_0"], expected.logits[0]) > 110


def test_a_trained_model_keeps_its_loss_in_q4_0(int4_folder, tmp_path):
    """llama.cpp rounds activations to INT8, 32 at a time, where a matrix is Q4_0."""
    export_gguf(open_folder(int4_folder), tmp_path / "gguf", GgufConfig())
    tokenizer = AutoTokenizer.from_pretrained(int4_folder)
    ids = tokenizer(prompts.load_texts()["knowledge"][:1000])["input_ids"][:256]
    inputs = make_inputs(DIMS.vocab_size, context=512) | {"ids": [ids]}
    found = run_llama_cpp(tmp_path / "gguf/model-q4_0.gguf", inputs, tmp_path / "found.npz")["logits_0"]
    with torch.no_grad():
        expected = MobileMoEForCausalLM.from_pretrained(int4_folder).eval()(torch.tensor([ids])).logits[0]
    assert measure_snr(found, expected) > 40
    losses = [cross_entropy(logits[:-1], torch.tensor(ids[1:])) for logits in (found, expected)]
    assert abs(losses[0] - losses[1]) < 0.01


@pytest.mark.parametrize(("single_digits", "ignore_merges"), [(False, False), (False, True), (True, False)])
def test_a_trained_tokenizer_gives_the_same_ids_and_chat(single_digits, ignore_merges, tmp_path):
    require_runtime("llama_cpp")
    texts = [*TEXTS, "def f(x):\n    return x**2  # 3.14159\n", "Der Straßenbahn-Fahrplan: 7:05, 17:35, 1234"] * 3
    dims = replace(DIMS, vocab_size=400)
    made = trained_tokenizer.train(iter(texts), 400, single_digits)
    trained_tokenizer.save(made, tmp_path / "tokenizer")
    if ignore_merges:
        path = tmp_path / "tokenizer/tokenizer.json"
        content = json.loads(path.read_text())
        content["model"]["ignore_merges"] = True
        path.write_text(json.dumps(content))
    write_hf_folder(random_tensors(dims), dims, tmp_path / "tokenizer", tmp_path / "bf16")
    export_gguf(open_folder(tmp_path / "bf16"), tmp_path / "gguf", GgufConfig("f32"))
    inputs = make_inputs(dims.vocab_size, lengths=(3,)) | {"texts": texts}
    found = run_llama_cpp(tmp_path / "gguf/model-f32.gguf", inputs, tmp_path / "found.npz")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bf16")
    assert found["tokens"] == [tokenizer(text)["input_ids"] for text in texts]
    assert found["prompt"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert found["prompt_tokens"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    ends = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    assert sorted(set(found["eos"])) == sorted(tokenizer.convert_tokens_to_ids(end) for end in ends)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization, reason",
    [
        (QuantizationConfig(expert_group_axis="out"), "--type q4_0: its blocks are 32 values along the input axis"),
        (QuantizationConfig(group_size=16), "--type q4_0: its blocks are 32 values along the input axis"),
    ],
)
def test_groups_that_are_no_blocks_are_refused(root, quantization, reason, tmp_path, capsys):
    folder = quantize_folder(root / "bf16", tmp_path / "int4", quantization)
    out = tmp_path / "gguf"
    assert main(["export", str(folder), "--format", "gguf", "--out", str(out)]) == REFUSED
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_a_weight_beyond_float16_is_refused(root, tmp_path):
    tensors = random_tensors()
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = 1e6
    write_hf_folder(tensors, DIMS, root / "tokenizer", tmp_path / "bf16")
    with pytest.raises(RefusedInput, match="beyond its range"):
        export_gguf(open_folder(tmp_path / "bf16"), tmp_path / "gguf", GgufConfig("f16"))
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Metaspace"}}, {"normalizer": {"type": "NFKC"}}, {"model": {"type": "Unigram"}},
        {"pre_tokenizer": None}, {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(root, change):
    content = json.loads((root / "tokenizer/tokenizer.json").read_text())
    assert find_word_splitter(content, "here") == "gpt-2"
    with pytest.raises(RefusedInput, match=re.escape("here: ")):
        find_word_splitter(content | change, "here")


def test_an_option_of_another_format_is_refused(root, tmp_path, capsys):
    for options in (["--format", "int4", "--type", "f16"], ["--format", "gguf", "--context", "64"]):
        assert main(["export", str(root / "bf16"), *options, "--out", str(tmp_path / "out")]) == REFUSED
        assert "is an option of --format" in " ".join(capsys.readouterr().err.split())


def test_the_card_s_commands_run(files, tmp_path):
    folder = files["int4", "q4_0"].parent
    assert run_card(folder, require_runtime("llama_cpp"), tmp_path).endswith("\n")
