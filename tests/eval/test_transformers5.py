"""Our folders in transformers 5, in a process of its own: the same numbers as in the 4.57 of this environment."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.export.hf_folder import write_hf_folder
from eval.export.hf_native import export_native
from eval.export.source import open_folder
from eval.hf_mobilemoe import MobileMoEForCausalLM
from eval.hf_mobilemoe.checkpoint_mobilemoe import tensor_shapes
from tests.eval.test_hf_native import measure_snr
from tests.eval.tiny_checkpoint import DIMS, quantize_folder, random_tensors, write_tokenizer
from tests.runtimes import SCRIPTS, require_runtime

FOLDERS = ("bf16", "bf16_new_form", "int4", "native")
TEXTS = ["the quick brown fox jumps", "over the lazy"]
MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("transformers5")
    write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")
    quantize_folder(root / "bf16", root / "int4")
    export_native(open_folder(root / "bf16"), root / "native")
    for name, factor in (("bf16_new_form", 16.0), ("bf16_torn", 4.0)):
        shutil.copytree(root / "bf16", root / name)
        config = json.loads((root / "bf16/config.json").read_text())
        config["rope_parameters"] = config["rope_scaling"] | {"rope_theta": config["rope_theta"], "factor": factor}
        if name == "bf16_new_form":
            del config["rope_scaling"], config["rope_theta"]
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def inputs(root):
    ids = torch.randint(DIMS.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    return {"ids": ids, "mask": mask, "texts": TEXTS, "messages": MESSAGES, "int4": str(root / "int4")}


@pytest.fixture(scope="module")
def results(root, inputs):
    environment = require_runtime("transformers5") | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    torch.save(inputs, root / "inputs.pt")
    script = SCRIPTS / "compute_in_transformers5.py"
    folders = [str(root / name) for name in (*FOLDERS, "bf16_torn")]
    command = [sys.executable, str(script), str(root / "inputs.pt"), str(root / "results.pt"), *folders]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = torch.load(root / "results.pt")
    assert found["version"].startswith("5.")
    return found


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request, root, results):
    """Return what transformers 5 gave for a folder, and the model in this process."""
    name = request.param
    own = AutoModelForCausalLM if name == "native" else MobileMoEForCausalLM
    assert not isinstance(results[name], str), results[name]
    return results[name], own.from_pretrained(root / name, dtype=torch.float32).eval()


def test_logits_are_equal(pair, inputs):
    found, model = pair
    with torch.no_grad():
        expected = model(inputs["ids"], attention_mask=inputs["mask"]).logits
    kept = inputs["mask"].bool()
    assert found["class"] == type(model).__name__
    assert measure_snr(found["logits"][kept], expected[kept]) > 100
    if found["packed"] is not None:
        assert measure_snr(found["packed"][kept], expected[kept]) > 100


def test_greedy_text_is_equal_with_and_without_cache(pair, root):
    found, model = pair
    tokenizer = AutoTokenizer.from_pretrained(root / "bf16")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = model.generate(**batch, max_new_tokens=24, do_sample=False)
    for greedy in found["greedy"]:
        torch.testing.assert_close(greedy, expected)


def test_chat_states_and_dtypes_are_equal(pair, root):
    found, _ = pair
    tokenizer = AutoTokenizer.from_pretrained(root / "bf16")
    assert found["chat"] == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert found["hidden_states"] == DIMS.n_layers + 1
    assert found["dtypes"] == ["torch.bfloat16", "torch.float32"]  # the router is float32


def test_what_transformers_5_saved_is_read_here(pair, inputs, root):
    found, model = pair
    saved = root / f"{Path(model.name_or_path).name}_saved"
    if isinstance(model, MobileMoEForCausalLM):  # the glm4_moe of 4.57 does not know `rope_parameters`
        again = MobileMoEForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = again(inputs["ids"], attention_mask=inputs["mask"]).logits
        kept = inputs["mask"].bool()
        assert measure_snr(logits[kept], found["logits"][kept]) > 100
    shutil.copytree(root / "tokenizer", saved, dirs_exist_ok=True)
    source, config = open_folder(saved), open_folder(root / "bf16").config
    assert (source.config.rope_theta, source.config.rope_scaling) == (config.rope_theta, config.rope_scaling)
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == tensor_shapes(config)


def test_two_forms_that_differ_are_refused_with_file_and_keys(results):
    error = results["bf16_torn"]
    assert "config.json" in error and "rope_scaling.factor is 16.0 and rope_parameters.factor is 4.0" in error
