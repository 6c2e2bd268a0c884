"""The dependencies keep what eval/compat.py relies on; every docstring names what breaks when its test fails."""

import json

import numpy as np
import pytest

from eval import compat


def test_lm_eval_task_files_lie_below_its_package():
    """find_lm_eval_tasks: no benchmark finds its stock task."""
    folder = compat.find_lm_eval_tasks()
    assert (folder / "piqa/piqa.yaml").is_file() and (folder / "bbh/fewshot").is_dir()


def test_lm_eval_merges_included_files_and_resolves_functions():
    """load_task_yaml: stock tasks lose the keys of the files they include, or hold their functions as text."""
    folder = compat.find_lm_eval_tasks()
    subject = compat.load_task_yaml(folder / "mmlu/default/mmlu_anatomy.yaml")
    assert subject["dataset_name"] == "anatomy" and subject["output_type"] == "multiple_choice"
    assert "include" not in subject
    assert callable(compat.load_task_yaml(folder / "drop/default.yaml")["process_results"])


@pytest.fixture(scope="module")
def lm():
    from lm_eval.api.model import TemplateLM

    class Bytes(TemplateLM):
        """Tokens are bytes; every continuation is worth minus its length, every generation is "4"."""

        @property
        def eot_token_id(self):
            return 0

        def tok_encode(self, string, **_):
            return list(string.encode())

        def loglikelihood(self, requests, **_):
            return [(-float(len(request.args[1])), False) for request in requests]

        _loglikelihood_tokens = loglikelihood_rolling = None

        def generate_until(self, requests, **_):
            return ["4" for _ in requests]

    Bytes.__abstractmethods__ = frozenset()
    return Bytes()


def build_task(name, rows, **config):
    from lm_eval.api.task import ConfigurableTask

    return ConfigurableTask(
        config={"task": name, "custom_dataset": lambda **_: {"test": rows}, "test_split": "test", **config}
    )


def test_lm_eval_scores_tasks_that_are_already_built(lm):
    """evaluate_tasks: no benchmark is scored, or a result's value, truncation count and prompt hash are wrong."""
    import datasets

    choices = datasets.Dataset.from_list([{"q": f"Q{i}:", "options": ["a", "bbb"], "gold": i % 2} for i in range(5)])
    sums = datasets.Dataset.from_list([{"q": "2+2=", "answer": "4"}] * 3)
    tasks = [
        build_task("choices", choices, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{options}}",
                   doc_to_target="gold", metric_list=[{"metric": "acc"}]),
        build_task("sums", sums, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{answer}}",
                   generation_kwargs={"until": ["\n"], "max_gen_toks": 8}, metric_list=[{"metric": "exact_match"}]),
    ]  # fmt: skip
    evaluated = compat.evaluate_tasks(lm, tasks, {"choices": 4, "sums": 2})
    assert evaluated["results"]["choices"]["acc,none"] == 0.5, "the shorter continuation is always chosen"
    assert evaluated["results"]["sums"]["exact_match,none"] == 1.0
    samples = evaluated["samples"]
    assert [len(samples["choices"]), len(samples["sums"])] == [4, 2]
    assert samples["choices"][1] | {"filter": "none", "target": 1, "acc": 0.0} == samples["choices"][1]
    assert samples["choices"][1]["arguments"] == [("Q1:", " a"), ("Q1:", " bbb")]
    assert samples["choices"][1]["doc"]["q"] == "Q1:" and len(samples["choices"][1]["resps"]) == 2
    ((prompt, options),) = samples["sums"][0]["arguments"]
    assert (prompt, options["max_gen_toks"]) == ("2+2=", 8)


def test_lm_eval_moves_a_contexts_trailing_space_to_the_continuation(lm):
    """encode_pair: truncated prompts are counted by other tokens than those that are scored."""
    assert compat.encode_pair(lm, "ab ", "c") == (list(b"ab"), list(b" c"))


def test_lm_eval_makes_samples_serializable():
    """make_serializable: the per-item log cannot be written, or metrics in it become text."""
    values = {"numpy": np.float32(0.5), "flag": np.bool_(True), "choices": {1}}
    text = json.dumps(values, default=compat.make_serializable)
    assert json.loads(text) == {"numpy": 0.5, "flag": True, "choices": [1]}
