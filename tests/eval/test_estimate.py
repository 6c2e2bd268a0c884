"""The estimate of an evaluation: its counts against the tokens that really pass through a model."""

import json
import shutil

import pytest

from core.progress import ignore_progress
from eval.benchmarks.estimate import Cost, Rates, count_requests, measure_rates
from eval.benchmarks.harness import load_model
from eval.benchmarks.scoring import BenchmarkTasks
from eval.benchmarks.slices import Slice
from eval.benchmarks.suites import get_suite
from eval.config import EvaluationConfig
from tests.eval.test_harness import save_model

KEYS = ("piqa", "winogrande", "mmlu", "arc_easy", "boolq", "drop", "triviaqa")


@pytest.fixture(scope="module")
def folders(items, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("estimate") / "model", context=256), items


def test_the_counts_are_those_of_the_tokens_that_pass(folders, tmp_path):
    model_dir, items = folders
    without_weights = tmp_path / "model"
    shutil.copytree(model_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    costs = count_requests(without_weights, items, EvaluationConfig(benchmarks=KEYS, limit=12), ignore_progress)
    lm = load_model(model_dir, batch_tokens=10_000)
    seen = {"prompt": 0, "generated": 0}

    def count(model, arguments, inputs):
        length = inputs["input_ids"].shape[1]
        if inputs["attention_mask"].dim() == 4:  # rows of contexts with their answers; token 0, "!", is in no item
            real, generating = int(inputs["input_ids"].count_nonzero()), False
        else:
            real = int(inputs["attention_mask"][:, -length:].sum())
            generating = length == 1 and inputs["past_key_values"].get_seq_length() > 0
        seen["generated" if generating else "prompt"] += real

    lm.model.register_forward_pre_hook(count, with_kwargs=True)
    for benchmark in get_suite("foundational", KEYS):
        cost = costs[benchmark.key]
        seen.update(prompt=0, generated=0)
        _, samples = BenchmarkTasks(benchmark, items, 12).score(lm, Slice(benchmark.key, 0, cost.items))
        assert cost.items == len(samples)
        assert cost.requests == sum(len(sample["arguments"]) for sample in samples)
        assert seen["prompt"] + seen["generated"] >= cost.computed_tokens
        if benchmark.chance:
            # An answer's second token passes alone, as a generated one does.
            assert seen["prompt"] + seen["generated"] == cost.computed_tokens
            assert cost.computed_tokens < cost.prompt_tokens and cost.generated_tokens == 0
        else:
            longest = samples[0]["arguments"][0][1]["max_gen_toks"]
            assert seen["prompt"] == cost.computed_tokens
            assert seen["generated"] < cost.generated_tokens <= longest * cost.items


def test_time_is_tokens_over_rates():
    cost = Cost(items=1, requests=1, prompt_tokens=900, computed_tokens=600, generated_tokens=50)
    assert Rates(prefill=300.0, decode=10.0).seconds(cost) == 2.0 + 5.0


def test_rates_are_measured(folders):
    rates = measure_rates(folders[0], batch_tokens=512)
    assert rates.prefill > 0 and rates.decode > 0


def test_the_command_prints_one_object_and_scores_nothing(folders, tmp_path, monkeypatch, capsys):
    from pipelines.cli import main
    from pipelines.commands import evaluate

    monkeypatch.setattr(evaluate, "prepare_items", lambda config: folders[1])
    model = shutil.copytree(folders[0], tmp_path / "model")
    command = ["eval", str(model), "--estimate", "--benchmarks", "piqa", "mmlu", "--workers", "4", "--json"]
    assert main([*command, "--prefill-rate", "1000", "--decode-rate", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["benchmarks"].keys() == {"piqa", "mmlu"} and found["workers"] == 4
    assert found["total"]["computed_tokens"] == sum(row["computed_tokens"] for row in found["benchmarks"].values())
    assert found["total"]["hours"] == pytest.approx(found["total"]["computed_tokens"] / 1000 / 3600 / 4)
    assert list(tmp_path.iterdir()) == [model]
    assert main([*command, "--prefill-rate", "0"]) == 2
    assert "--prefill-rate 0: give a whole number" in capsys.readouterr().err
    assert main(["eval", str(model), "--workers", "4"]) == 2
    assert "--workers 4: is an option of the estimate" in capsys.readouterr().err
