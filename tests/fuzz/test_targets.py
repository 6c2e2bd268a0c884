"""A fixed sample of the inputs of every target; `make fuzz` takes many more (docs/security.md)."""

import pytest

from tests.eval.tiny_checkpoint import write_bf16_folder
from tests.fuzz.cpp import build_fuzzer, find_compiler, run_fuzzer
from tests.fuzz.targets import TARGETS, make_model_targets
from tests.fuzz.text_targets import make_text_targets

MODEL_TARGETS = (
    "config.json",
    "tokenizer and generation files",
    "safetensors header",
    "chat template",
    "GGUF metadata",
)


@pytest.fixture(scope="module")
def model_targets(tmp_path_factory):
    model = write_bf16_folder(tmp_path_factory.mktemp("fuzz") / "model")
    return {target.name: target for target in (*make_model_targets(model), *make_text_targets(model))}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_reader_reads_or_refuses(target, tmp_path):
    outcomes = {target.try_input(number, tmp_path) for number in range(target.sample)}
    assert outcomes == {"read", "refused"} or target.name == "calls of tools", "the sample holds both"


@pytest.mark.parametrize("name", MODEL_TARGETS)
def test_a_reader_of_models_reads_or_refuses(name, model_targets, tmp_path):
    target = model_targets[name]
    assert {target.try_input(number, tmp_path) for number in range(target.sample)} == {"read", "refused"}


@pytest.mark.skipif(find_compiler() is None, reason="no g++")
def test_the_op_and_the_reader_of_model_files_under_sanitizers(tmp_path):
    done = run_fuzzer(build_fuzzer(tmp_path), 0, 3_000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("tried 3000\n")
