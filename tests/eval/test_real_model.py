"""A real model, SmolLM2-135M-Instruct out of a package: 50 real items a benchmark, beside lm-eval's own model.

`python -m benchmarks.smollm2` has all items; docs/evaluation.md has its table.
"""

import pytest
from lm_eval.models.huggingface import HFLM

from benchmarks import smollm2
from core.errors import RefusedInput
from core.progress import ignore_progress
from eval import compat
from eval.benchmarks.harness import evaluate
from eval.benchmarks.slices import read_samples
from eval.benchmarks.tasks import build_tasks
from eval.config import EvaluationConfig

KEYS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "winogrande", "boolq")
ITEMS, COMPARED = 50, 6
LIKELY = {"hellaswag": (0.25, 0.60), "piqa": (0.46, 0.82), "arc_easy": (0.28, 0.65)}
"""Range of the score of 50 items: some two and a half standard errors around that of all items."""


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Model folder, items, results and samples by benchmark."""
    root = tmp_path_factory.mktemp("smollm2")
    try:
        model, items = smollm2.prepare(root)
    except (KeyError, RefusedInput) as error:
        pytest.skip(f"the registry does not give {smollm2.PACKAGE} or the items: {error}")
    config = EvaluationConfig(benchmarks=KEYS, limit=ITEMS)
    results = evaluate(model, items=items, out=root / "out", config=config, progress=ignore_progress)
    return model, items, results, {key: read_samples(root / f"out/{key}.samples.jsonl.zst") for key in KEYS}


def test_a_real_model_is_better_than_a_guess(scored):
    _, _, results, _ = scored
    for key, (lowest, highest) in LIKELY.items():
        assert results[key]["items"] == ITEMS and lowest <= results[key]["value"] <= highest
    assert results["arc_easy"]["value"] > 0.25 + 2 * results["arc_easy"]["stderr"]


def test_log_likelihoods_and_answers_are_those_of_lm_evals_own_model(scored):
    model, items, _, samples = scored
    stock = HFLM(pretrained=str(model), backend="causal", device="cpu", dtype="float32", batch_size=8)
    for key in KEYS:
        tasks = build_tasks(smollm2.BENCHMARKS[key], items)
        found = compat.evaluate_tasks(stock, tasks, {tasks[0].task_name: range(COMPARED)})
        for theirs, ours in zip(found["samples"][tasks[0].task_name], samples[key], strict=False):
            expected = [float(response[0]) for response in theirs["filtered_resps"]]
            logged = [float(response[0][0]) for response in ours["resps"]]
            assert logged == pytest.approx(expected, abs=2e-3, rel=1e-4), key
            assert theirs["acc"] == ours["acc"]
