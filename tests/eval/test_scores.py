"""Scores and losses of models, beside chance and beside each other on the same items and windows."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.benchmarks.suites import FOUNDATIONAL
from eval.report.compare import compare_runs
from eval.report.heldout_tables import subtract_losses
from eval.report.scores import MODELS, average_scores, compare_with_chance, describe_chance, subtract
from pipelines.cli import main
from tests.eval.test_report import put, result


@pytest.mark.parametrize(
    ("value", "stderr", "chance", "expected"),
    [
        (0.25, 0.01, 0.25, "chance"),
        (0.269, 0.01, 0.25, "chance"),
        (0.271, 0.01, 0.25, "above"),
        (0.22, 0.01, 0.25, "below"),
        (0.0, 0.0, 0.0, "chance"),
        (0.01, 0.002, 0.0, "above"),
        (0.5, None, 0.5, None),
    ],
)
def test_a_score_within_two_standard_errors_is_chance(value, stderr, chance, expected):
    assert compare_with_chance(value, stderr, chance) == expected


def test_an_average_needs_every_benchmark():
    rows = [
        {"title": str(i), "scores": {model: None for model in MODELS} | {"sft": {"value": i / 10, "stderr": 0.03}}}
        for i in range(3)
    ]
    averages = average_scores(rows)
    assert averages["sft"] == {"value": pytest.approx(0.1), "stderr": pytest.approx(math.sqrt(3) * 0.03 / 3)}
    assert averages["qat_int4"] is None
    assert describe_chance(rows, "qat_int4") == "QAT, INT4: no benchmark has been scored yet."


def test_a_difference_is_that_of_the_same_items():
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 400).astype(float)
    after = np.where(rng.random(400) < 0.05, 1 - before, before)  # the models agree on 95 of 100 items
    arguments = [result(FOUNDATIONAL[1], 0.5) | {"values": list(values)} for values in (after, before)]
    found = subtract(*arguments)
    paired = stats.ttest_rel(after, before)
    assert found["value"] == pytest.approx(after.mean() - before.mean())
    assert found["value"] / found["stderr"] == pytest.approx(paired.statistic)
    separate = math.hypot(stats.sem(after), stats.sem(before))
    assert found["stderr"] < separate / 2, "items on which both agree add no error"
    assert subtract(arguments[0], arguments[1] | {"prompts_sha256": "b"}) is None, "other prompts"
    assert subtract(arguments[0], None) is None
    earlier = {key: value for key, value in arguments[1].items() if key != "values"}
    assert subtract(arguments[0], earlier) is None


def losses(seed, shift, windows=300, digest="a"):
    """A held-out result over windows of 20 tokens, whose difficulty differs more than the models do."""
    rng = np.random.default_rng(7)
    hard, own = rng.normal(5, 1, windows), np.random.default_rng(seed).normal(0, 0.02, windows)
    sums = 20 * (hard + own + shift)
    domain = {"loss": sums.sum() / 20 / windows, "tokens": 20 * windows, "windows": [[x, 20] for x in sums.tolist()]}
    return {
        "loss": domain["loss"],
        "tokens": domain["tokens"],
        "by_domain": {"web": domain | {"targets_sha256": digest}},
    }


def test_a_difference_of_losses_is_that_of_the_same_windows():
    first, second = losses(1, 0.01), losses(2, 0.0)
    found = subtract_losses(first, second)
    pairs = zip(first["by_domain"]["web"]["windows"], second["by_domain"]["web"]["windows"], strict=True)
    changes = [(x - y) / 20 for (x, _), (y, _) in pairs]
    assert found["value"] == pytest.approx(np.mean(changes))
    assert found["stderr"] == pytest.approx(stats.sem(changes), rel=1e-6), "windows of one length: an ordinary mean"
    assert found["verdict"] == "above"
    assert subtract_losses(losses(1, 0.0), losses(2, 0.0))["verdict"] == "chance"
    assert subtract_losses(first, losses(2, 0.0, digest="b"))["stderr"] is None, "other texts"
    assert subtract_losses(first, None) is None


def test_two_runs_beside_each_other(tmp_path, capsys):
    for name, piqa, shift in (("a", 0.75, 0.01), ("b", 0.25, 0.0)):
        put(tmp_path / name / "eval/sft/piqa.json", result(FOUNDATIONAL[1], piqa, items=40))
        put(tmp_path / name / "eval/sft/siqa.json", result(FOUNDATIONAL[2], piqa, items=40, prompts=name))
        put(tmp_path / name / "eval/heldout.json", {"sft": {"text": losses(1, shift), "sft": losses(2, 0.0)}})
        put(tmp_path / name / "manifest.json", {"steps": {}, "recipe": {}})
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    piqa, siqa = found["benchmarks"]
    assert piqa["paired"] and not siqa["paired"]
    assert piqa["difference"]["value"] == siqa["difference"]["value"] == 0.5
    assert siqa["difference"]["stderr"] == pytest.approx(math.hypot(0.05, 0.05))
    text, conversations = found["heldout"]
    assert text["difference"]["value"] == pytest.approx(0.01) and text["difference"]["verdict"] == "above"
    assert conversations["difference"]["value"] == 0
    assert main(["report", "--compare", str(tmp_path / "b"), str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().out
    assert "3 of 4 differences are beyond two standard errors" in printed and "other items" in printed
    assert not (tmp_path / "a/report").exists()
    (tmp_path / "b/eval").rename(tmp_path / "gone")
    assert main(["report", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]) == 2
    assert "have measured nothing that both have" in capsys.readouterr().err
