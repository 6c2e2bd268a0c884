"""The dtype of inference: the folder's own, or float32 where a CPU only emulates products of 16 bits."""

import json

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from streaming import MDSWriter

from core.progress import ignore_progress
from core.samples import SHARD_HASH, TEXT_COLUMNS
from eval.benchmarks.harness import load_model
from eval.benchmarks.heldout import heldout_loss
from eval.compute_dtype import choose_dtype
from eval.export.hf_folder import write_hf_folder
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer

PRODUCTS = "eval.compute_dtype.has_bfloat16_products"


@pytest.mark.parametrize(
    ("config", "with_products", "without"),
    [
        ({"dtype": "bfloat16"}, "bfloat16", "float32"),
        ({"torch_dtype": "float16"}, "float16", "float32"),
        ({"dtype": "float32"}, "float32", "float32"),
        ({}, "auto", "auto"),
    ],
)
def test_16_bits_become_float32_where_they_are_emulated(config, with_products, without, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for present, expected in ((True, with_products), (False, without)):
        monkeypatch.setattr(PRODUCTS, lambda present=present: present)
        assert choose_dtype(tmp_path) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights in BF16."""
    root = tmp_path_factory.mktemp("model")
    return write_hf_folder(random_tensors(), DIMS, write_tokenizer(root / "tokenizer"), root / "bf16")


def test_scores_of_both_dtypes_agree_within_the_rounding_of_activations(folder, monkeypatch):
    questions, answers = ("the quick brown", "dog", "fox jumps over the lazy"), (" fox", " dog", " the", " over lazy")
    requests = [
        Instance("loglikelihood", {}, (question, answer), i)
        for i, (question, answer) in enumerate((q, a) for q in questions for a in answers)
    ]
    scores = {}
    for present, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(PRODUCTS, lambda present=present: present)
        lm = load_model(folder, batch_tokens=256)
        assert lm.model.dtype == dtype
        scores[dtype] = np.array([score for score, _ in lm.loglikelihood(requests)])
    spread = scores[torch.float32].std()
    assert np.abs(scores[torch.bfloat16] - scores[torch.float32]).max() < 0.1 * spread


def test_the_held_out_loss_states_its_dtype_and_is_nearly_the_same(folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with MDSWriter(out=str(tmp_path / "web"), columns=TEXT_COLUMNS, hashes=[SHARD_HASH]) as writer:
        for length in (40, 60, 90):
            writer.write({"tokens": rng.integers(0, DIMS.vocab_size, length).astype(np.uint32)})
    found = {}
    for present in (True, False):
        monkeypatch.setattr(PRODUCTS, lambda present=present: present)
        result = heldout_loss(folder, tmp_path, max_tokens=500, context=64, batch_tokens=256, progress=ignore_progress)
        found[result["dtype"]] = result["loss"]
    assert found.keys() == {"bfloat16", "float32"}
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=5e-3)
