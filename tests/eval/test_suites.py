"""The table of benchmarks against the paper's facts and lm-eval's task files."""

import pytest

from eval.benchmarks.baselines import BASELINES, PUBLISHED_QAT_COST
from eval.benchmarks.suites import FOUNDATIONAL, QUESTIONS, SUITES, get_suite, list_benchmarks
from eval.benchmarks.tasks import find_stock_files
from eval.compat import load_task_yaml

CHOICES = {"hellaswag": 4, "piqa": 2, "siqa": 3, "winogrande": 2, "mmlu": 4, "arc_easy": 4, "arc_challenge": 4,
           "openbookqa": 4, "boolq": 2, "gpqa": 4}  # fmt: skip


def test_the_suite_is_the_papers_fourteen():
    assert [len(SUITES["foundational"]), len({b.key for b in FOUNDATIONAL})] == [14, 14]
    zero_shot = {b.key for b in FOUNDATIONAL if b.category in ("commonsense", "science")} | {"boolq"}
    assert {b.key for b in FOUNDATIONAL if b.shots == 0} == zero_shot


@pytest.mark.parametrize("benchmark", [b for b in list_benchmarks() if b not in QUESTIONS], ids=lambda b: b.key)
def test_chance_and_metric_fit_the_stock_task(benchmark):
    stock = load_task_yaml(find_stock_files(benchmark.key)[0], functions=not benchmark.runs_code)
    assert benchmark.chance == (1 / CHOICES[benchmark.key] if benchmark.key in CHOICES else 0.0)
    assert (stock["output_type"] == "multiple_choice") == (benchmark.key in CHOICES)
    if benchmark.runs_code:
        assert benchmark.metric == "pass_at_1,none" and stock["unsafe_code"], "the sandbox replaces its metric"
        return
    metric, metric_filter = benchmark.metric.split(",")
    assert metric in {m["metric"] for m in stock["metric_list"]}
    assert metric_filter in {f["name"] for f in stock.get("filter_list", [{"name": "none"}])}


def test_published_figures():
    assert {b.key: b.published_base for b in FOUNDATIONAL if b.published_base} == {
        "hellaswag": 0.589, "piqa": 0.754, "siqa": 0.468, "winogrande": 0.586, "arc_easy": 0.739, "openbookqa": 0.346,
        "boolq": 0.602,
    }  # fmt: skip
    for name, cost in PUBLISHED_QAT_COST.items():
        model = BASELINES[name.lower()]
        assert model.qat - model.sft == pytest.approx(cost, abs=0.051)


def test_an_unknown_suite_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'advance' is not a suite; choose one of advanced, foundational, questions"):
        get_suite("advance")


def test_an_unknown_benchmark_is_refused_with_those_of_the_suite():
    with pytest.raises(ValueError, match="the suite foundational has no 'pica'; choose among hellaswag, piqa"):
        get_suite("foundational", ("boolq", "pica"))
    assert [b.key for b in get_suite("foundational", ("boolq", "piqa"))] == ["piqa", "boolq"], "in the suite's order"
