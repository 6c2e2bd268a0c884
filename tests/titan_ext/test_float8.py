"""Products in float8: padding and emulation against loops over experts, the model's conversion, what is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtitan.components.quantization import Float8Linear
from torchtitan.models.common import Linear

import titan_ext.mobilemoe.group_padding as group_padding
import titan_ext.quantization.float8 as float8
from core.errors import RefusedInput
from titan_ext.config import FLAVORS
from titan_ext.cpu.float8 import emulate_grouped_product
from titan_ext.mobilemoe import model_config
from titan_ext.mobilemoe.group_padding import pad_groups_to
from titan_ext.mobilemoe.moe import Experts, RouterGate
from titan_ext.mobilemoe.recomputation import KeepProducts
from titan_ext.quantization.config import FLOAT8_MULTIPLE

DIMS = dataclasses.replace(FLAVORS["tiny"], n_layers=1, vocab_size=64)
LARGEST = 448.0
"""Largest number of float8 e4m3."""


def round_vector(x: torch.Tensor) -> torch.Tensor:
    """Round one vector to float8 by a scale that is a power of two, in float64; independent of torchao."""
    largest = x.double().abs().max().clamp(min=1e-12)
    scale = 2.0 ** torch.floor(torch.log2(LARGEST / largest))
    return (x.double() * scale).to(torch.float8_e4m3fn).double() / scale


def round_along(x: torch.Tensor, dim: int) -> torch.Tensor:
    moved = x.movedim(dim, -1)
    rounded = torch.stack([round_vector(vector) for vector in moved.reshape(-1, moved.shape[-1])])
    return rounded.view(moved.shape).movedim(-1, dim)


def draw(*shape: int) -> torch.Tensor:
    """Rows of very different sizes."""
    return (torch.randn(*shape) * torch.logspace(-3, 2, shape[-2]).unsqueeze(-1)).bfloat16()


def test_the_emulated_product_is_a_loop_over_experts():
    torch.manual_seed(0)
    counts, k, n = [16, 48, 16], 32, 48
    a, b = draw(sum(counts), k).requires_grad_(), draw(3, n, k).transpose(-2, -1).requires_grad_()
    grad = draw(sum(counts), n)
    out = emulate_grouped_product(a, b, torch.tensor(counts).cumsum(0).int())
    out.backward(grad)
    for expert, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        x, w, g = a.detach()[rows], b.detach()[expert], grad[rows]
        expected = {
            "out": (out[rows], round_along(x, -1) @ round_along(w, -2)),
            "input": (a.grad[rows], round_along(g, -1) @ round_along(w, -1).T),
            "weight": (b.grad[expert], round_along(x, 0).T @ round_along(g, 0)),
        }
        for name, (found, wanted) in expected.items():
            size = wanted.abs().amax()
            torch.testing.assert_close(found.double() / size, wanted / size, rtol=8e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("on_gpu", [False, True])
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=6), multiple=st.sampled_from([1, 8, 16]))
@settings(max_examples=30, deadline=None)
def test_padding_adds_zeros_and_takes_them_away(on_gpu, counts, multiple):
    group_padding.IS_CPU = not on_gpu  # a GPU takes the most rows that may be needed
    try:
        padding = pad_groups_to(multiple, torch.tensor(counts), sum(counts))
    finally:
        group_padding.IS_CPU = True
    x = torch.randn(sum(counts), 3, requires_grad=True)
    padded = padding.add(x)
    lengths = padding.counts_E.tolist()
    assert all(length % multiple == 0 and length > 0 for length in lengths)
    assert sum(lengths) <= len(padded) and (on_gpu or sum(lengths) == len(padded)) and len(padded) % multiple == 0
    parts, rows = padded[: sum(lengths)].split(lengths), x.split(counts)
    for part, group in zip(parts, rows, strict=True):
        assert (
            torch.equal(part[: len(group)], group)
            and part[len(group) :].eq(0).all()
            and len(part) - len(group) <= multiple
        )
    assert torch.equal(padding.remove(padded), x)
    weight = torch.randn_like(padded)
    grad = torch.autograd.grad((padding.remove(padded * weight) ** 2).sum(), x)[0]
    expected = torch.autograd.grad(((x * padding.remove(weight)) ** 2).sum(), x)[0]
    torch.testing.assert_close(grad, expected)
    given_grad = torch.autograd.grad(padding.remove(made := torch.randn_like(padded, requires_grad=True)).sum(), made)[
        0
    ]
    assert given_grad.sum() == x.numel() and given_grad[sum(lengths) :].eq(0).all()


def test_experts_with_any_numbers_of_rows_are_a_loop_over_them():
    """Forward, backward, an expert without tokens: each expert alone gives the same, padded with zeros by hand."""
    torch.manual_seed(0)
    d, f, counts = 32, 48, [5, 0, 33, 16]
    experts = float8.Float8Experts.Config(dim=d, hidden_dim=f, num_experts=4).build().bfloat16()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    x = torch.randn(sum(counts), d, dtype=torch.bfloat16, requires_grad=True)
    out = experts(x, torch.tensor(counts))
    grad = torch.randn_like(out)
    out.backward(grad)
    start = 0
    for expert, count in enumerate(counts):
        single = float8.Float8Experts.Config(dim=d, hidden_dim=f, num_experts=1).build().bfloat16()
        for name, weight in single.named_parameters():
            weight.data.copy_(getattr(experts, name)[expert : expert + 1].detach())
        length = max(FLOAT8_MULTIPLE, -(-count // FLOAT8_MULTIPLE) * FLOAT8_MULTIPLE)
        own = torch.zeros(length, d, dtype=torch.bfloat16)
        own[:count] = x[start : start + count].detach()
        own.requires_grad_()
        alone = single(own, torch.tensor([length]))
        (alone[:count] * grad[start : start + count]).sum().backward()
        assert torch.equal(alone[:count], out[start : start + count])
        torch.testing.assert_close(own.grad[:count], x.grad[start : start + count], rtol=1e-2, atol=1e-3)
        for name, weight in single.named_parameters():
            torch.testing.assert_close(weight.grad[0], getattr(experts, name).grad[expert], rtol=1e-2, atol=1e-3)
            assert count or weight.grad.eq(0).all()
        start += count


def test_the_products_of_the_blocks_are_converted_and_no_others():
    config = float8.convert_to_float8(model_config(DIMS))
    linears = {name: type(old) for name, old, _, _ in config.traverse(Linear.Config)}
    plain = {name for name, kind in linears.items() if kind is not Float8Linear.Config}
    assert plain == {"lm_head", "layers.0.moe.router.gate"} and len(linears) == 2 + 6
    assert linears["layers.0.moe.router.gate"] is RouterGate.Config
    assert [type(old) for _, old, _, _ in config.traverse(Experts.Config)] == [float8.Float8Experts.Config]
    model = config.build()
    torch.manual_seed(0)
    model.init_states()
    names = set(dict(model.named_parameters()))
    assert names == set(dict(model_config(DIMS).build().named_parameters())), "checkpoints fit both"


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_model_in_float8_is_close_to_bfloat16_and_not_equal(checkpoint):
    tokens, positions = torch.randint(0, DIMS.vocab_size, (2, 32)), torch.arange(32).repeat(2, 1)
    losses, gradients = [], []
    for convert in (lambda config: config, float8.convert_to_float8):
        model = convert(model_config(DIMS)).build()
        torch.manual_seed(0)
        model.init_states()
        model.bfloat16()
        for block in model.layers.values():
            block.moe.expert_bias_E = block.moe.expert_bias_E.float()
        if checkpoint:
            KeepProducts.Config().build().apply(model)
        logits = model(tokens, positions=positions)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=1e-2)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 1e-3 < error < 0.2


def test_a_card_without_float8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(RefusedInput, match=r"A100.*8\.0.*set it to False"):
        float8.refuse_card_without_float8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    float8.refuse_card_without_float8()
