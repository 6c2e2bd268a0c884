"""Inputs of the transformers model, unquantized and packed: what is no prompt is refused with its value and limit."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from eval.export.dimensions import config_from_dims
from eval.hf_mobilemoe import MobileMoEForCausalLM
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_int4_folder, write_tokenizer
from titan_ext.quantization.config import QuantizationConfig

LIMIT, VOCAB = DIMS.max_seq_len, DIMS.vocab_size
IDS = torch.tensor([[9, 10, 11, 12]])
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=["float", "packed"])
def model(request, tmp_path_factory):
    if request.param == "float":
        config = config_from_dims(DIMS)
        return MobileMoEForCausalLM.from_pretrained(None, config=config, state_dict=random_tensors()).eval()
    root = tmp_path_factory.mktemp("inputs")
    tokenizer = write_tokenizer(root / "tokenizer")
    folder = write_int4_folder(random_tensors(), DIMS, tokenizer, root / "int4", QuantizationConfig())
    return MobileMoEForCausalLM.from_pretrained(folder, keep_int4=True).eval()


def cache_of(model, ids=IDS):
    with torch.inference_mode():
        return model(ids, use_cache=True).past_key_values


def mask(*rows):
    return {"attention_mask": torch.tensor(rows)}


NOT_IDS = {
    "empty prompt": (torch.zeros(1, 0, dtype=torch.int64), "int64 [1, 0]: the prompt is empty"),
    "no sequence": (torch.zeros(0, 4, dtype=torch.int64), "int64 [0, 4]: the prompt is empty"),
    "beyond the vocabulary": (torch.tensor([[9, VOCAB]]), f"input_ids has {VOCAB}: ids are 0 to {VOCAB - 1}"),
    "far beyond": (torch.tensor([[9, 2**40]]), f"input_ids has {2**40}: ids are 0 to {VOCAB - 1}"),
    "negative": (torch.tensor([[-1, 9]]), f"input_ids has -1: ids are 0 to {VOCAB - 1}"),
    "floats": (torch.tensor([[9.0, 10.0]]), "float32 [1, 2]: give int64 ids [batch, length]"),
    "booleans": (torch.tensor([[True, False]]), "bool [1, 2]: give int64 ids"),
    "bytes": (torch.tensor([[9, 10]], dtype=torch.uint8), "uint8 [1, 2]: give int64 ids"),
    "one dimension": (torch.tensor([9, 10]), "int64 [2]: give int64 ids [batch, length]"),
    "three dimensions": (torch.tensor([[[9, 10]]]), "int64 [1, 1, 2]: give int64 ids"),
    "a list": ([[9, 10]], "a list: give int64 ids"),
}


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("case", NOT_IDS)
def test_what_is_no_prompt_is_refused_with_value_and_limit(model, method, case):
    ids, message = NOT_IDS[case]
    with pytest.raises(ValueError) as caught:
        getattr(model, method)(ids, **({"max_new_tokens": 2} if method == "generate" else {}))
    assert message in str(caught.value)


REFUSED = {
    "no ids and no embeddings": ({}, "exactly one of input_ids and inputs_embeds"),
    "ids and embeddings": (
        {"input_ids": IDS, "inputs_embeds": torch.zeros(1, 4, DIMS.d_model)}, "exactly one of input_ids",
    ),
    "embeddings of another width": ({"inputs_embeds": torch.zeros(1, 4, 63)}, "float32 [1, 4, 63]: give floats"),
    "no embeddings": ({"inputs_embeds": torch.zeros(1, 0, DIMS.d_model)}, "float32 [1, 0, 64]: give floats"),
    "mask of another length": ({"input_ids": IDS} | mask([1, 1, 1]), "int64 [1, 3]: give [1, 4]"),
    "mask that is too long": ({"input_ids": IDS} | mask([1, 1, 1, 1, 1]), "int64 [1, 5]: give [1, 4]"),
    "mask of another batch": ({"input_ids": IDS} | mask([1] * 4, [1] * 4), "int64 [2, 4]: give [1, 4]"),
    "mask of one dimension": ({"input_ids": IDS} | mask(1, 1, 1, 1), "int64 [4]: give [1, 4]"),
    "mask of zeros": ({"input_ids": IDS} | mask([0, 0, 0, 0]), "0 throughout sequence 0"),
    "batch with an empty sequence": (
        {"input_ids": IDS.expand(2, -1)} | mask([1] * 4, [0] * 4), "0 throughout sequence 1: an empty prompt",
    ),
    "additive mask": ({"input_ids": IDS} | mask([0.0, float("-inf"), 0.0, 0.0]), "attention_mask has -inf"),
    "position beyond the model": (
        {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, LIMIT]])}, f"has {LIMIT}: positions are 0 to",
    ),
    "negative position": ({"input_ids": IDS, "position_ids": torch.tensor([[-1, 0, 1, 2]])}, "has -1: positions are 0"),
    "gap in the positions": ({"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 3, 4]])}, "1 to 3: 2 follows"),
    "gap before the first": ({"input_ids": IDS, "position_ids": torch.tensor([[5, 6, 7, 8]])}, "begin at 5: 0 tokens"),
    "gap between tokens of a padded prompt": (
        {"input_ids": IDS, "position_ids": torch.tensor([[1, 0, 1, 3]])} | mask([0, 1, 1, 1]), "go from 1 to 3",
    ),
    "positions of another length": ({"input_ids": IDS, "position_ids": torch.arange(3)[None]}, "int64 [1, 3]: give"),
    "positions as floats": ({"input_ids": IDS, "position_ids": torch.arange(4.0)[None]}, "float32 [1, 4]: give int64"),
    "gap in the cache positions": ({"input_ids": IDS, "cache_position": torch.arange(2, 6)}, "take the places 0 to 3"),
    "cache positions out of order": ({"input_ids": IDS, "cache_position": torch.tensor([0, 2, 1, 3])}, "places 0 to 3"),
    "cache positions of another length": ({"input_ids": IDS, "cache_position": torch.arange(3)}, "give int64 places"),
    "a tuple as cache": ({"input_ids": IDS, "past_key_values": ()}, "a tuple: give a Cache"),
    "longer than the context": (
        {"input_ids": torch.full((1, LIMIT + 1), 9)}, f"ends at position {LIMIT}: the model's context",
    ),
    "labels of another shape": ({"input_ids": IDS, "labels": IDS.T}, "int64 [4, 1]: give int64 ids [1, 4]"),
    "label beyond the vocabulary": ({"input_ids": IDS, "labels": IDS + VOCAB}, f"labels has {VOCAB + 9}"),
    "negative label": ({"input_ids": IDS, "labels": torch.tensor([[9, -1, 9, 9]])}, "labels has -1"),
    "negative number of logits": ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep is -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_of_forward_that_do_not_fit_are_refused(model, case):
    arguments, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        model(**arguments)
    assert message in str(caught.value)


@torch.inference_mode()
def test_a_cache_that_does_not_fit_is_refused(model):
    def refused(**arguments):
        with pytest.raises(ValueError) as caught:
            model(**{"input_ids": IDS[:, :1]} | arguments)
        return str(caught.value)

    assert "(1, 2, 16), this call (2, 2, 16)" in refused(
        input_ids=IDS[:, :1].expand(2, -1), past_key_values=cache_of(model)
    )
    other = DynamicCache()
    for layer in range(3):
        other.update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), layer)
    assert "3 layers, the model 2" in refused(past_key_values=other)
    other = DynamicCache()
    for layer in range(DIMS.n_layers):
        other.update(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8), layer)
    assert "(1, 4, 8), this call (1, 2, 16)" in refused(past_key_values=other)
    # Four tokens are in the cache.
    assert "take the places 4 to 4" in refused(past_key_values=cache_of(model), cache_position=torch.tensor([6]))
    assert "begin at 6: 4 tokens are before it" in refused(
        past_key_values=cache_of(model), position_ids=torch.tensor([[6]])
    )
    assert "int64 [1, 1]: give [1, 5]" in refused(past_key_values=cache_of(model), **mask([1]))
    static = StaticCache(model.config, max_cache_len=4)
    model(IDS, past_key_values=static, cache_position=torch.arange(4))
    assert "the cache holds 4 tokens" in refused(past_key_values=static, cache_position=torch.tensor([4]))
    full = cache_of(model, torch.full((1, LIMIT), 9))
    assert f"ends at position {LIMIT}: the model's context" in refused(past_key_values=full)


GENERATE = {
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens is 0: give a whole number from 1"),
    "negative new tokens": ({"max_new_tokens": -3}, "max_new_tokens is -3"),
    "a float": ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    "one too many": ({"max_new_tokens": LIMIT - 3}, f"has 4 tokens and max_new_tokens is {LIMIT - 3}"),
    "max_length beyond the context": ({"max_length": LIMIT + 1}, f"max_length is {LIMIT + 1}"),
    "in a config": ({"generation_config": GenerationConfig(max_new_tokens=10**9)}, f"is {LIMIT} tokens for both"),
    "max_length below the prompt": ({"max_length": 3}, "max_length"),
    "padding behind": ({"max_new_tokens": 2} | mask([1, 1, 1, 0]), "padded on the left"),
    "padding throughout": ({"max_new_tokens": 2} | mask([0, 0, 0, 0]), "0 throughout sequence 0"),
    "padding ids behind": ({"inputs": torch.tensor([[9, 10, 5]]), "pad_token_id": 5}, "padded on the left"),
    "padding ids alone": ({"inputs": torch.tensor([[5, 5, 5]]), "pad_token_id": 5}, "0 throughout sequence 0"),
    "embeddings too": ({"inputs_embeds": torch.zeros(1, 4, DIMS.d_model)}, "exactly one"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_arguments_of_generate_that_do_not_fit_are_refused(model, case):
    arguments, message = GENERATE[case]
    with pytest.raises(ValueError) as caught:
        model.generate(**{"inputs": IDS, "do_sample": False, "eos_token_id": 1} | arguments)
    assert message in str(caught.value)


@torch.inference_mode()
def test_a_cache_is_continued_by_the_whole_conversation(model):
    with pytest.raises(ValueError, match="has 4 tokens and past_key_values holds 4: give the whole conversation"):
        model.generate(IDS, past_key_values=cache_of(model), max_new_tokens=2, **GREEDY)
    longer = torch.cat([IDS, IDS[:, :1]], dim=1)
    found = model.generate(longer, past_key_values=cache_of(model), max_new_tokens=2, **GREEDY)
    assert torch.equal(found, model.generate(longer, max_new_tokens=2, **GREEDY))


@torch.inference_mode()
def test_inputs_at_their_limits_compute(model):
    ids = torch.randint(8, VOCAB, (1, LIMIT), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([0, VOCAB - 1])
    logits = model(ids).logits
    assert logits.shape == (1, LIMIT, VOCAB) and logits.isfinite().all()
    new = model.generate(ids[:, :-1], max_new_tokens=1, **GREEDY)
    assert new.shape == (1, LIMIT) and new[0, -1] == logits[0, -2].argmax()
    assert torch.equal(model(ids.int()[:, :9]).logits, model(ids[:, :9]).logits)


@torch.inference_mode()
def test_a_prompt_computed_again_is_the_same(model):
    first, again = (model(IDS, use_cache=True).logits for _ in range(2))
    assert torch.equal(first, again)
    followed = model(IDS[:, :1], past_key_values=cache_of(model), position_ids=torch.tensor([[4]])).logits[0, -1]
    whole = model(torch.cat([IDS, IDS[:, :1]], dim=1)).logits[0, -1]
    assert torch.allclose(followed, whole, atol=1e-4)


@torch.inference_mode()
def test_padding_in_front_changes_nothing(model):
    """Given as a mask, or found by its id, as transformers does it."""
    padded = torch.tensor([[5, 5, 9, 10, 11, 12], [9, 10, 11, 12, 13, 14]])
    given = (padded != 5).long()
    expected = model.generate(IDS, max_new_tokens=3, **GREEDY)[0, 4:]
    for options in ({"attention_mask": given}, {}):
        found = model.generate(padded, max_new_tokens=3, **GREEDY | {"pad_token_id": 5}, **options)
        assert torch.equal(found[0, 6:], expected)


def test_no_prompt_at_all_begins_with_bos(model):
    found = model.generate(max_new_tokens=2, bos_token_id=3, **GREEDY)
    assert found.shape == (1, 3) and found[0, 0] == 3


@torch.inference_mode()
def test_values_are_not_looked_at_while_torch_compiles(model):
    """A look would break the graph, or fix its length."""
    seen = []
    compiled = torch.compile(model, backend=lambda graph, inputs: seen.append(graph) or graph.forward)
    assert torch.allclose(compiled(IDS, use_cache=False).logits, model(IDS).logits, atol=1e-5)
    assert seen
