"""Held-out loss against transformers' own loss, one document at a time."""

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter
from transformers import LlamaConfig, LlamaForCausalLM

from core.errors import DamagedData, RefusedInput
from core.progress import ignore_progress
from core.samples import SFT_COLUMNS, SHARD_HASH, TEXT_COLUMNS
from eval.benchmarks.heldout import cut_windows, heldout_loss, read_documents
from eval.export.hf_folder import write_hf_folder
from eval.hf_mobilemoe.modeling_mobilemoe import MobileMoEForCausalLM
from tests.eval.tiny_checkpoint import DIMS, random_tensors, write_tokenizer

VOCAB = 50


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write(folder, samples, masked=False, compression="zstd"):
    options = {"compression": compression, "hashes": [SHARD_HASH], "size_limit": 500}
    with MDSWriter(out=str(folder), columns=SFT_COLUMNS if masked else TEXT_COLUMNS, **options) as writer:
        for sample in samples:
            writer.write(sample)


def some_documents(seed, lengths, masked=False):
    rng = np.random.default_rng(seed)
    samples = [{"tokens": rng.integers(0, VOCAB, n).astype(np.uint32)} for n in lengths]
    if masked:
        for sample in samples:
            sample["loss_mask"] = rng.integers(0, 2, len(sample["tokens"])).astype(np.uint8)
    return samples


def reference(model_dir, samples):
    """Sum of losses and count, each document alone, whole, through the model's own `labels` loss."""
    model = LlamaForCausalLM.from_pretrained(model_dir).eval()
    total, count = 0.0, 0
    for sample in samples:
        tokens = torch.from_numpy(sample["tokens"].astype(np.int64))[None]
        labels = tokens.clone()
        if "loss_mask" in sample:
            labels[0, sample["loss_mask"] == 0] = -100
        targets = int((labels[0, 1:] != -100).sum())
        if targets:
            with torch.no_grad():
                total += model(tokens, labels=labels).loss.item() * targets
            count += targets
    return total, count


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_that_of_the_documents_alone(tmp_path, model_dir, masked):
    by_domain = {"web": some_documents(1, [5, 33, 64, 2, 17], masked), "code": some_documents(2, [40, 9], masked)}
    for domain, samples in by_domain.items():
        write(tmp_path / domain, samples, masked)
    result = heldout_loss(
        model_dir, tmp_path, max_tokens=10_000, context=64, batch_tokens=192, progress=ignore_progress
    )
    sums = {domain: reference(model_dir, samples) for domain, samples in by_domain.items()}
    for domain, (total, count) in sums.items():
        assert result["by_domain"][domain]["tokens"] == count
        assert result["by_domain"][domain]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["tokens"] == sum(count for _, count in sums.values())
    assert result["loss"] == pytest.approx(sum(t for t, _ in sums.values()) / result["tokens"], rel=1e-5)


def test_a_document_longer_than_the_context_is_scored_in_windows(tmp_path, model_dir):
    tokens = some_documents(3, [41])[0]["tokens"]
    write(tmp_path / "web", [{"tokens": tokens}])
    result = heldout_loss(
        model_dir, tmp_path, max_tokens=10_000, context=16, batch_tokens=128, progress=ignore_progress
    )
    pieces = [{"tokens": tokens[start : start + 17]} for start in (0, 16, 32)]
    total, count = reference(model_dir, pieces)
    assert (result["tokens"], count) == (40, 40)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_batch_changes_nothing(tmp_path, model_dir):
    write(tmp_path / "web", some_documents(4, [3, 30, 12, 50, 8, 8]))
    losses = [
        heldout_loss(model_dir, tmp_path, max_tokens=90, context=32, batch_tokens=32 * size, progress=ignore_progress)
        for size in (1, 5)
    ]
    assert losses[0]["tokens"] == losses[1]["tokens"] == 90
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    context=st.integers(1, 50),
    max_tokens=st.integers(1, 200),
)
def test_windows_give_every_target_once_in_order_up_to_the_limit(lengths, context, max_tokens):
    samples = some_documents(0, lengths)
    given_targets = [
        int(t) for _, targets, counted in cut_windows(samples, context, max_tokens) for t in targets[counted]
    ]
    all_targets = [int(t) for sample in samples for t in sample["tokens"][1:]]
    assert given_targets == all_targets[:max_tokens]
    assert all(len(inputs) <= context for inputs, _, _ in cut_windows(samples, context, max_tokens))


@pytest.mark.parametrize("compression", ["zstd", None])
def test_documents_come_back_in_order_and_leave_nothing_behind(tmp_path, monkeypatch, compression):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    samples = some_documents(5, [100] * 9)
    write(tmp_path / "web", samples, compression=compression)
    before = sorted(path.name for path in (tmp_path / "web").iterdir())
    assert len(before) > 3, "several shards"
    read = [sample["tokens"] for sample in read_documents(tmp_path / "web")]
    assert list(scratch.iterdir()) == []
    next(read_documents(tmp_path / "web"))
    assert list(scratch.iterdir()) == [], "also where the reader stops early"
    assert all(np.array_equal(a, b["tokens"]) for a, b in zip(read, samples, strict=True))
    assert sorted(path.name for path in (tmp_path / "web").iterdir()) == before


@pytest.mark.parametrize("compression", ["zstd", None])
def test_a_damaged_shard_is_named(tmp_path, model_dir, compression):
    write(tmp_path / "web", some_documents(6, [100] * 4), compression=compression)
    shard = next((tmp_path / "web").glob("shard.*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises((ValueError, DamagedData), match=f"{shard.name} is damaged"):
        heldout_loss(model_dir, tmp_path, max_tokens=10_000, context=16, batch_tokens=128, progress=ignore_progress)


def test_bad_input_is_refused(tmp_path, model_dir):
    arguments = dict(max_tokens=100, batch_tokens=64, progress=ignore_progress)
    with pytest.raises(ValueError, match=r"no <domain>/index\.json"):
        heldout_loss(model_dir, tmp_path, context=16, **arguments)
    write(tmp_path / "web", [{"tokens": np.array([1, VOCAB, 2], np.uint32)}])
    with pytest.raises(ValueError, match=f"token {VOCAB}, but the model's vocab_size is {VOCAB}"):
        heldout_loss(model_dir, tmp_path, context=16, **arguments)
    with pytest.raises(ValueError, match="max_position_embeddings 64"):
        heldout_loss(model_dir, tmp_path, context=65, **arguments)
    (tmp_path / "config.json").write_text('{"model_type": "mobilemoe"}')
    with pytest.raises(RefusedInput, match=r"config\.json lacks vocab_size"):
        heldout_loss(tmp_path, tmp_path, context=16, **arguments)


def test_nothing_to_measure_is_refused_and_a_domain_without_targets_has_no_loss(tmp_path, model_dir):
    arguments = dict(context=16, batch_tokens=64, progress=ignore_progress)
    write(tmp_path / "short", [{"tokens": np.array([1], np.uint32)}] * 3)
    unmasked = {"tokens": np.array([1, 2, 3], np.uint32), "loss_mask": np.array([1, 0, 0], np.uint8)}
    write(tmp_path / "unmasked", [unmasked], masked=True)
    with pytest.raises(RefusedInput, match=r"no document of short, unmasked .* has a token to predict"):
        heldout_loss(model_dir, tmp_path, max_tokens=100, **arguments)
    write(tmp_path / "web", [{"tokens": np.array([1, 2, 3], np.uint32)}])
    measured = heldout_loss(model_dir, tmp_path, max_tokens=100, **arguments)
    for domain in ("short", "unmasked"):
        assert (measured["by_domain"][domain]["loss"], measured["by_domain"][domain]["tokens"]) == (None, 0)
    assert measured["tokens"] == 2 and measured["loss"] == measured["by_domain"]["web"]["loss"]
    for nothing in (0, -1):
        with pytest.raises(RefusedInput, match=f"max_tokens is {nothing}"):
            heldout_loss(model_dir, tmp_path, max_tokens=nothing, **arguments)


def test_a_mask_of_another_length_is_damage():
    sample = {"tokens": np.arange(5, dtype=np.uint32), "loss_mask": np.ones(4, np.uint8)}
    with pytest.raises(DamagedData, match="sample 0 has 5 tokens but a loss_mask of 4"):
        list(cut_windows([sample], 16, 100))


def test_the_load_of_experts_by_domain_is_that_of_each_document_alone(tmp_path):
    folder = write_hf_folder(
        random_tensors(), DIMS, write_tokenizer(tmp_path / "tokenizer"), tmp_path / "model", dtype=torch.float32
    )
    domains = {"web": some_documents(1, [3, 17, 40]), "code": some_documents(2, [25, 9])}
    for domain, samples in domains.items():
        write(tmp_path / "shards" / domain, samples)
    measured = heldout_loss(
        folder, tmp_path / "shards", max_tokens=10_000, context=16, batch_tokens=64, progress=ignore_progress
    )
    model = MobileMoEForCausalLM.from_pretrained(folder).eval()
    blocks = [layer.feed_forward for layer in model.model.layers]
    for domain, samples in domains.items():
        counts_LE = torch.zeros(DIMS.n_layers, DIMS.n_experts)

        def count(block, inputs, counts_LE=counts_LE):
            (x_BLD,) = inputs
            scores_LE = torch.sigmoid(x_BLD[0].float() @ block.router.weight.T) + block.expert_bias
            for expert in scores_LE.argsort(dim=-1, descending=True)[:, : DIMS.top_k].flatten():
                counts_LE[blocks.index(block), expert] += 1

        handles = [block.register_forward_pre_hook(count) for block in blocks]
        for sample in samples:
            tokens = torch.from_numpy(sample["tokens"].astype(np.int64))
            for start in range(0, len(tokens) - 1, 16):
                with torch.no_grad():
                    model(input_ids=tokens[start : start + min(16, len(tokens) - 1 - start)][None])
        for handle in handles:
            handle.remove()
        found = torch.tensor(measured["by_domain"][domain]["expert_load"])
        torch.testing.assert_close(found, counts_LE / counts_LE.sum(dim=1, keepdim=True), atol=1e-6, rtol=0)
