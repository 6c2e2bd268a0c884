"""Rotary positions with real numbers against torchtitan's complex ones and transformers' of Llama 3."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torchtitan.models.common import ComplexRoPE
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from titan_ext.mobilemoe.rope import InterleavedRoPE

OPTIONS = {
    "dim": 64, "max_seq_len": 64, "theta": 500_000.0, "scaling": "llama", "scaling_factor": 32.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
POSITIONS = {
    "in order": None,
    "one row of packed documents": torch.cat([torch.arange(20), torch.arange(12)])[None],
    "two rows": torch.stack([torch.arange(32), torch.arange(32).flip(0) + 31]),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["as on the CPU", "as on a GPU"])
def test_bits_are_those_of_complex_numbers(on_gpu, dtype, positions, monkeypatch):
    """Forward and backward: the gradient is a rotation too."""
    monkeypatch.setattr("titan_ext.mobilemoe.rope.IS_CPU", not on_gpu)
    torch.manual_seed(0)
    rows = 1 if positions is None else len(positions)
    q_BLNH, k_BLNH = (torch.randn(rows, 32, n, 64).to(dtype) for n in (4, 2))
    results = []
    for kind in (InterleavedRoPE, ComplexRoPE):
        q, k = q_BLNH.clone().requires_grad_(), k_BLNH.clone().requires_grad_()
        rotated = kind.Config(**OPTIONS).build()(q, k, positions)
        torch.autograd.backward(rotated, [q_BLNH.sin(), k_BLNH.sin()])
        results.append([*rotated, q.grad, k.grad])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_angles_are_those_of_transformers():
    """transformers rotates the first half of a head with the second half: the same pairs in another order."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_theta=500_000.0,
        rope_scaling={"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192},
    )  # fmt: skip
    q_BLNH = torch.randn(1, 64, 4, 64)
    ours, _ = InterleavedRoPE.Config(**OPTIONS).build()(q_BLNH, q_BLNH)
    halves_BNLH = q_BLNH.unflatten(-1, (32, 2)).transpose(-2, -1).flatten(-2).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(halves_BNLH, torch.arange(64)[None])
    theirs, _ = apply_rotary_pos_emb(halves_BNLH, halves_BNLH, cos, sin)
    theirs = theirs.transpose(1, 2).unflatten(-1, (2, 32)).transpose(-2, -1).flatten(-2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_angles_stay_in_float32_when_the_model_is_cast():
    rope = InterleavedRoPE.Config(**OPTIONS).build()
    exact = rope.cache.clone()
    assert torch.equal(rope.to(torch.bfloat16).cache, exact)
    assert rope.to("meta").cache.device.type == "meta"


def test_a_compiled_rotation_has_no_complex_number():
    rope = InterleavedRoPE.Config(**OPTIONS).build()
    found = []

    def note(graph: torch.fx.GraphModule, inputs: list) -> object:
        values = tree_leaves([node.meta.get("example_value") for node in graph.graph.nodes])
        found.extend(value.dtype for value in values if isinstance(value, torch.Tensor))
        return graph.forward

    x = torch.randn(1, 8, 2, 64)
    compiled = torch.compile(rope, backend=note, fullgraph=True)(x, x)
    torch.testing.assert_close(compiled, rope(x, x))
    assert found and not any(dtype.is_complex for dtype in found)
