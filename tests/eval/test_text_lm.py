"""Items of benchmarks are encoded as text, and otherwise as lm-eval does it."""

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AddedToken, AutoTokenizer

from eval.benchmarks.harness import load_model
from tests.eval.test_harness import save_model

SPELLINGS = ("<eos>", "<bos>", "<think>")
TEXTS = ("A river of 1234 lanterns.", " leading", "    four", "é 日本\n", "a" * 300)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model that the harness loads, and lm-eval's own of the same folder."""
    folder = save_model(tmp_path_factory.mktemp("model"), context=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.save_pretrained(folder)
    stock = HFLM(pretrained=str(folder), backend="causal", device="cpu", dtype="auto", batch_size=1)
    return load_model(folder, batch_tokens=64), stock


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_is_encoded_as_lm_eval_does_it(models, text):
    ours, stock = models
    for options in ({}, {"add_special_tokens": False}, {"left_truncate_len": 5}):
        assert ours.tok_encode(text, **options) == stock.tok_encode(text, **options)
    batch = [text, "short"]
    for options in ({}, {"left_truncate_len": 8}, {"padding_side": "right"}):
        for found, expected in zip(
            ours.tok_batch_encode(batch, **options), stock.tok_batch_encode(batch, **options), strict=True
        ):
            assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("spelled", SPELLINGS)
def test_an_item_that_spells_a_special_token_is_text(models, spelled):
    ours, stock = models
    special = stock.tokenizer.convert_tokens_to_ids(spelled)
    text = f"{spelled} ends {spelled}"
    assert special in stock.tok_encode(text)
    (row,) = ours.tok_batch_encode([text])[0].tolist()
    for ids in (ours.tok_encode(text), row):
        assert special not in ids
        assert ours.tok_decode(ids, skip_special_tokens=False) == text
    context, continuation = ours._encode_pair(f"Q {spelled}", f" {spelled}")
    assert special not in context + continuation
    assert ours.tok_decode(continuation, skip_special_tokens=False) == f" {spelled}"
