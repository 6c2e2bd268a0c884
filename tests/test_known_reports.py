"""Cases of public bug reports, tried here. docs/known_reports.md lists them all; most have their tests in the rooms."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from datatrove.utils.hashing import HashConfig, create_hash_func
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import compat
from eval.benchmarks.harness import load_model
from eval.export.hf_folder import write_hf_folder
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer
from tests.titan_ext.stage_of_shards import DOCUMENTS, G, build, sequences, write_stage
from titan_ext.config import FLAVORS
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.qat import convert_to_qat, fake_quantize_activation, fake_quantize_weight

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "known_reports.md"


def test_every_test_that_the_page_names_exists():
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 25
    missing = [
        f"{file}::{test}" for file, test in named if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_text_is_hashed_as_its_utf8_bytes_and_no_xxhash_that_refuses_text_is_installed():
    """datatrove #507 and #508: xxhash 4 raises TypeError for text, so every duplicate filter fails."""
    for precision, reference in ((64, xxhash.xxh64_intdigest), (32, xxhash.xxh32_intdigest)):
        hash_text = create_hash_func(HashConfig(precision=precision, hash_fc="xxhash"))
        for text in ("", "a", "Größe 中 \U0001f600"):
            assert hash_text(text) == reference(text.encode())
    assert "xxhash<4" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_documents_go_on_exactly_over_epochs_and_several_resumes(tmp_path):
    """streaming #869 (no resume beyond the first epoch), datasets #8295 (a second resume begins at the first row)."""
    stage = write_stage(tmp_path / "stage")
    steps = 70
    whole = build(stage, tmp_path / "cache")
    expected = sequences([whole], steps * G)
    assert min(whole.statistics()["epochs"].values()) > 2 and set(whole.statistics()["epochs"]) == set(DOCUMENTS)
    state, found = None, []
    for taken in (13, 14, 1, 30, 12):  # the third epoch of every domain begins on the way
        loader = build(stage, tmp_path / "cache")
        if state is not None:
            loader.load_state_dict(state)
        found.append(sequences([loader], taken * G))
        state = loader.state_dict()
    np.testing.assert_array_equal(np.concatenate(found), expected)


KILLED = """
import sys
from pathlib import Path
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval import compat
from eval.export.hf_folder import write_hf_folder
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer
from tests.titan_ext.stage_of_shards import G, build, sequences
rows = sequences([build(sys.argv[1], Path(sys.argv[2]))], G)
print(int(rows.sum()), flush=True)
sys.stdin.read()
"""


def test_a_killed_reader_leaves_no_shared_memory_and_the_next_one_starts(tmp_path):
    """streaming #781 and #573: shared memory that a killed run left stops every later one with FileExistsError."""
    stage = write_stage(tmp_path / "stage")
    arguments = [sys.executable, "-c", KILLED, str(stage), str(tmp_path / "cache")]
    printed = set()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        with subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as reader:
            printed.add(reader.stdout.readline())
            opened = {os.readlink(link) for link in _list_links(reader.pid)}
            reader.send_signal(signal.SIGKILL)
        assert not {path for path in opened if path.startswith("/dev/shm/")}
        assert not [path.name for path in Path("/dev/shm").iterdir() if re.match(r"\d{6}_", path.name)]
    assert len(printed) == 1 and printed != {""}


def _list_links(pid):
    """Return the links of a process's open files and mapped files."""
    for folder in ("fd", "map_files"):
        for link in Path(f"/proc/{pid}/{folder}").iterdir():
            if os.path.lexists(link):
                yield link


@pytest.mark.parametrize("counts", [[5, 0, 3, 0, 0, 0, 0, 4], [0, 0, 0, 0, 0, 0, 0, 0], [0, 12, 0, 0, 0, 0, 0, 0]])
def test_quantized_experts_take_ragged_and_empty_groups(counts):
    """The routings of ao #4917. In pytorch #172439 and torchtitan #1237 missing rows gave gradients or NaN."""
    torch.manual_seed(0)
    model = convert_to_qat(model_config(FLAVORS["tiny"]), QuantizationConfig()).build()
    model.init_states()
    experts = model.layers["0"].moe.routed_experts.inner_experts
    count_E = torch.zeros(FLAVORS["tiny"].n_experts, dtype=torch.int64)
    count_E[: len(counts)] = torch.tensor(counts)
    x_RD = torch.randn(int(count_E.sum()), FLAVORS["tiny"].d_model, requires_grad=True)
    out_RD = experts(x_RD, count_E)
    out_RD.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in experts.parameters()]

    w1_EFD, w2_EDF, w3_EFD = experts.local_weights()
    for parameter in experts.parameters():
        parameter.grad = None
    expected, start = [], 0
    for expert, count in enumerate(count_E.tolist()):
        x_ND = fake_quantize_activation(x_RD[start : start + count])
        h_NF = torch.nn.functional.silu(x_ND @ w1_EFD[expert].T) * (x_ND @ w3_EFD[expert].T)
        expected.append(fake_quantize_activation(h_NF) @ w2_EDF[expert].T)
        start += count
    expected_RD = torch.cat(expected)
    torch.testing.assert_close(out_RD, expected_RD)
    expected_RD.square().sum().backward()
    for parameter, gradient in zip(experts.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
        assert torch.equal(gradient[count_E == 0], torch.zeros_like(gradient[count_E == 0]))


@pytest.mark.parametrize("group_size", [16, 64])
def test_quantized_training_takes_the_group_size_that_was_asked_for(group_size):
    """ao #3572: quantization-aware training took groups of 128 whatever the configuration said."""
    model = convert_to_qat(model_config(FLAVORS["tiny"]), QuantizationConfig(group_size=group_size)).build()
    model.init_states()
    experts = model.layers["0"].moe.routed_experts.inner_experts
    for plain, quantized in zip((experts.w1_EFD, experts.w2_EDF, experts.w3_EFD), experts.local_weights(), strict=True):
        assert torch.equal(quantized, fake_quantize_weight(plain, group_size))
    assert {m.group_size for m in model.modules() if hasattr(m, "group_size")} == {group_size}


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(tmp_path):
    """llama.cpp #6111, transformers #24899: a 32,001st token beside an embedding of 32,000 rows."""
    small = dataclasses.replace(DIMS, vocab_size=256)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"the id \d+, config.json has vocab_size 256"):
        write_hf_folder(random_tensors(small), small, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_a_benchmark_begins_with_one_bos():
    """lm-evaluation-harness #3295 left the BOS out, #3333 and #3347 had it twice."""
    words = {word: i for i, word in enumerate(("<bos>", "<pad>", "a", "b", "c"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", eos_token="<pad>")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    lm = HFLM(pretrained=LlamaForCausalLM(LlamaConfig(vocab_size=5, **size)), tokenizer=fast, backend="causal")
    assert compat.encode_pair(lm, "a b", " c") == ([0, 2, 3], [4])
    assert lm.tok_encode("a") == [0, 2]
    assert lm.prefix_token_id == 0, "an empty context is a BOS"


@pytest.fixture(scope="module")
def trained():
    """The model that training builds, with the random weights of the folder `exported`."""
    config = model_config(DIMS)
    model = config.build()
    model.init_states()
    model.load_state_dict(MobileMoEStateDictAdapter(config, None).from_hf(random_tensors()))
    return model.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with random weights in float32, as an export writes it."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = write_tokenizer(folder / "tokenizer")
    return write_hf_folder(random_tensors(), DIMS, tokenizer, folder / "model", dtype=torch.float32)


@torch.no_grad()
def _logprobs(trained, ids):
    """Return the trained model's log-probabilities [L, V] for one sequence, without cache and padding."""
    return trained(torch.tensor([ids]), positions=torch.arange(len(ids))[None])[0].log_softmax(-1)


def test_no_tensor_of_the_experts_is_left_out_after_a_renaming(trained, tmp_path):
    """torchtitan #4475: experts had new names; exports left them out, imports filled parameters that do not exist."""
    adapter, state = MobileMoEStateDictAdapter(trained.config, None), trained.state_dict()
    for name in (name for name in state if ".moe." in name):
        renamed = {key if key != name else f"{key}_new": value for key, value in state.items()}
        with pytest.raises((ValueError, KeyError), match=re.escape(name)):
            adapter.to_hf(renamed)
    released = adapter.to_hf(state)
    back = adapter.from_hf(released)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert all(state[name].count_nonzero() for name in state if name.endswith("expert_bias_E"))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    for name in (name for name in released if re.search(r"\.0\.feed_forward\.(experts|expert_bias)", name)):
        with pytest.raises(ValueError, match=re.escape(f"{name}_new")):
            adapter.from_hf({f"{name}_new": released[name]})
        others = {key: value for key, value in released.items() if key != name}
        with pytest.raises(ValueError, match=re.escape(name)):
            write_hf_folder(others, DIMS, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_generated_answers_are_those_of_the_trained_model(trained, exported):
    """lm-evaluation-harness #3150: two backends scored GSM8K far apart, with gibberish in the place of answers."""
    lm = load_model(exported, batch_tokens=300)
    prompts = ["dog", "the quick brown fox jumps over the lazy dog " * 3, "fox jumps"]
    options = {"until": ["\n\n"], "max_gen_toks": 24}
    answers = lm.generate_until(
        [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]
    )
    stops = set(lm.model.generation_config.eos_token_id)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = lm.tok_encode(prompt)
        length = len(ids)
        while len(ids) < length + 24 and not stops & set(ids[length:]):
            ids.append(int(_logprobs(trained, ids)[-1].argmax()))
        assert answer == lm.tok_decode(ids[length:])


def test_a_question_is_computed_once_for_all_answers_of_one_token(trained, exported):
    """lm-evaluation-harness #3604: its vLLM backend computed the whole question again for every answer."""
    lm = load_model(exported, batch_tokens=100)
    questions, answers = ("the quick brown", "the lazy dog jumps over", "fox"), (" fox", " dog", " the", " over")
    computed = []
    lm.model.register_forward_pre_hook(
        lambda _, __, inputs: computed.extend(inputs["input_ids"].tolist()), with_kwargs=True
    )
    pairs = [(question, answer) for question in questions for answer in answers]
    scores = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    assert len(computed) == len(questions)
    for pair, (score, is_greedy) in zip(pairs, scores, strict=True):
        context, (answer,) = compat.encode_pair(lm, *pair)
        expected = _logprobs(trained, context)[-1]
        assert score == pytest.approx(float(expected[answer]), rel=1e-3)
        assert is_greedy == (int(expected.argmax()) == answer)
