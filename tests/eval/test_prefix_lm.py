"""Prefixes computed once: scores, texts and choices are those of lm-eval's own model, whatever is batched with what."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
)

from eval.benchmarks import prefix_lm, shared_prefixes
from eval.benchmarks.cached_rows import batch, can_continue
from eval.benchmarks.packed_rows import PackedRow, score_packed, score_targets
from eval.benchmarks.prefix_lm import PrefixLM
from eval.benchmarks.shared_prefixes import group_by_prefix
from eval.benchmarks.text_lm import TextLM
from eval.export.hf_folder import write_hf_folder
from tests.eval.tiny_checkpoint import DIMS, LLAMA_SIZES, random_tensors, write_tokenizer


@pytest.fixture(scope="module", params=["mobilemoe", "llama", "qwen3", "gemma3", "bloom"])
def models(request, tmp_path_factory):
    """The same random model of 256 tokens as PrefixLM and as lm-eval loads it."""
    folder = tmp_path_factory.mktemp("prefix") / "model"
    tokenizer = write_tokenizer(folder.parent / "tokenizer")
    if request.param == "mobilemoe":
        write_hf_folder(random_tensors(), DIMS, tokenizer, folder, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        if request.param == "gemma3":  # its layers see 16 tokens, and bloom takes no positions: they are not shared
            model = Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA_SIZES, sliding_window=16))
        else:
            config = {"llama": LlamaConfig, "qwen3": Qwen3Config, "bloom": BloomConfig}[request.param](**LLAMA_SIZES)
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        write_tokenizer(folder)
    options = {"pretrained": str(folder), "backend": "causal", "device": "cpu", "dtype": "float32", "batch_size": 3}
    return PrefixLM(**options, batch_tokens=300), TextLM(**options), request.param


def make_ids(length, seed):
    return random.Random(seed).choices(range(8, 300), k=length)


def make_requests():
    """Two subjects with shots, questions with answers of one or more tokens, some longer than the model's context."""
    requests = []
    for subject in range(2):
        shots = make_ids(90, subject)
        for question in range(9):
            context = shots + make_ids(3 + 7 * question, (subject, question).__hash__())
            requests += [(context, make_ids(1 + n * (question % 3), 17 * n + question)) for n in range(4)]
    for question in range(5):
        context = make_ids(10 + 61 * question, 100 + question)  # the last is cut off on the left
        requests += [(context, make_ids(5 + n, n)) for n in range(3)]
    requests.append(requests[3])  # twice the same
    random.Random(0).shuffle(requests)
    return [((str(number), ""), context, continuation) for number, (context, continuation) in enumerate(requests)]


def test_which_models_are_shared(models):
    ours, _, kind = models
    assert can_continue(ours.model) == (kind not in ("gemma3", "bloom"))


def test_scores_are_lm_evals(models):
    ours, stock, _ = models
    requests = make_requests()
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([score for score, _ in found]), torch.tensor([score for score, _ in expected]),
        atol=2e-3, rtol=1e-4,
    )  # fmt: skip


def test_of_equal_logits_the_first_is_greedy():
    """The argmax of lm-eval's model chooses so; in bfloat16 two are often equal."""
    logits_TV = torch.tensor([[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [2.0, -1.0, 0.5]])
    expected_T = logits_TV.log_softmax(-1)[range(3), [1, 2, 0]]
    scores_T, greedy_T = score_targets(logits_TV, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(scores_T, expected_T)
    assert greedy_T.tolist() == [True, False, True]


def test_a_greedy_continuation_is_recognized(models):
    ours, stock, _ = models
    context = make_ids(40, 3)
    with torch.no_grad():
        ids = stock.model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False, eos_token_id=-1)
    continuation = ids[0, 40:].tolist()
    wrong = [*continuation[:-1], (continuation[-1] + 1) % 300]
    requests = [(("", ""), context, answer) for answer in (continuation, wrong, continuation[:1], wrong[:1])]
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True, True]


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_scores_do_not_depend_on_the_batch_or_the_order(models, batch_tokens):
    ours, _, _ = models
    requests = make_requests()
    expected = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    other = copy.copy(ours)
    other.batch_tokens = batch_tokens
    order = random.Random(batch_tokens).sample(range(len(requests)), len(requests))
    found = other._loglikelihood_tokens([requests[i] for i in order], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [expected[i][1] for i in order]
    assert [score for score, _ in found] == pytest.approx([expected[i][0] for i in order], abs=2e-3, rel=1e-4)


def make_prompts():
    shots = "the quick brown fox jumps over the lazy dog. " * 4
    prompts = [shots + question for question in ("the quick", "fox", "a lazy dog and a brown fox", "over")]
    return [*prompts, "dog", "the quick brown " * 30, prompts[1]]


def generate(lm, options):
    instances = [Instance("generate_until", {}, (prompt, dict(options)), i) for i, prompt in enumerate(make_prompts())]
    return lm.generate_until(instances, disable_tqdm=True)


@pytest.mark.parametrize(
    "options",
    [
        {"until": ["\n\n"], "max_gen_toks": 20},
        {"until": [" "], "max_gen_toks": 60, "do_sample": False, "temperature": 0.0},
        {"until": ["q", "\n"], "max_gen_toks": 31},
        {"max_gen_toks": 5},
        {"until": ["x"], "max_gen_toks": 8, "do_sample": False, "repetition_penalty": 1.5},
    ],
)  # fmt: skip
def test_texts_are_lm_evals(models, options):
    ours, stock, _ = models
    found = generate(ours, options)
    assert found == generate(stock, options)
    assert len(set(found)) > 1


def test_stops_that_spell_special_tokens(models):
    """A token ends a text where a stop names it, and its spelling is no text that could hold a stop."""
    ours, _, _ = models
    if ours._cached is None:
        return
    end = ours.tokenizer.convert_tokens_to_ids("<|eom_id|>")
    text = ours.tok_encode("quick fox", add_special_tokens=False)
    assert ours._has_stop([*text, end], ["<|eom_id|>"]) and ours._has_stop([*text, end], ["x"])
    assert not ours._has_stop([*text, end], ["m", "<|eot_id|>", ""])


def test_options_of_the_models_own_generation_config_count(models, monkeypatch):
    ours, stock, _ = models
    plain = generate(ours, {"max_gen_toks": 20})
    for lm in (ours, stock):
        monkeypatch.setattr(lm.model.generation_config, "repetition_penalty", 100.0)
    changed = generate(ours, {"max_gen_toks": 20})
    # Random models have near ties, and bloom's numbers depend on what a batch pads: both take the same batches.
    monkeypatch.setattr(stock, "batch_size_per_gpu", ours.batch_size_per_gpu)
    assert changed == generate(stock, {"max_gen_toks": 20}) != plain


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), max_size=40, unique=True))
def test_every_sequence_is_in_one_group_whose_prefix_it_begins_with(sequences):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "MIN_PREFIX", 3)
        patch.setattr(shared_prefixes, "MIN_SAVED", 6)
        groups = group_by_prefix(sequences)
    assert sorted(ids for _, group in groups for ids in group) == sorted(sequences)
    for prefix, group in groups:
        assert all(ids[: len(prefix)] == prefix and len(ids) > len(prefix) for ids in group)
        assert not prefix or (len(prefix) >= 3 and len(prefix) * (len(group) - 1) >= 6)
    assert [prefix for prefix, _ in groups].count(()) <= 1


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_batches_hold_all_and_no_more_than_the_limit(lengths, limit):
    lengths = sorted(lengths, reverse=True)
    batches = list(batch(lengths, limit))
    assert [i for numbers in batches for i in numbers] == list(range(len(lengths)))
    assert all(len(n) == 1 or lengths[n[0]] * len(n) <= limit for n in batches)
    for numbers, following in pairwise(batches):
        grown = lengths[numbers[0]] * (len(numbers) + 1)
        padding = 1 - sum(lengths[i] for i in (*numbers, following[0])) / grown
        assert grown > limit or (grown > limit / 8 and padding > 0.1), "a batch ends too early"


@pytest.mark.parametrize("answers", [((7,),), ((7, 8, 9),), ((7,), (8, 9), (10, 11, 12, 13), (7, 9))])
def test_a_row_of_a_context_and_its_answers_scores_each_as_if_alone(models, answers):
    ours, _, _ = models
    if not can_continue(ours.model):
        return
    rows = [PackedRow(tuple(make_ids(n, n)), answers) for n in (1, 5, 23)]
    found = score_packed(ours.model, rows)
    for row, scores in zip(rows, found, strict=True):
        for answer, (score, greedy) in zip(answers, scores, strict=True):
            with torch.no_grad():
                logprobs_LV = ours.model(torch.tensor([[*row.context, *answer]])).logits[0].log_softmax(-1)
            targets = list(enumerate(answer, len(row.context) - 1))
            assert score == pytest.approx(float(sum(logprobs_LV[i, token] for i, token in targets)), rel=1e-4)
            assert greedy == all(int(logprobs_LV[i].argmax()) == token for i, token in targets)


def test_long_rows_and_models_without_such_masks_take_the_cache(models, monkeypatch):
    ours, _, _ = models
    requests = make_requests()
    expected = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    monkeypatch.setattr(prefix_lm, "MAX_ROW", 30)
    monkeypatch.setattr(prefix_lm, "MAX_LOGITS", 320 * 40)
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-3, rel=1e-4)


def test_short_sequences_do_not_pass_with_long_ones():
    assert list(batch([100] * 10 + [20] * 50, 8000)) == [range(11), range(11, 60)]
