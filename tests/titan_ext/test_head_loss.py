"""The chunked loss of the output projection against plain PyTorch on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.models.common import Linear

from titan_ext.quantization.qat import QATLinear, fake_quantize_activation, fake_quantize_weight
from titan_ext.training.head_loss import HeadLoss, add_product

B, L, D, V, CHUNKS = 2, 16, 32, 50, 8


def compute_both(
    head: torch.nn.Module, dtype: torch.dtype, seed: int, masked: set[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return loss and gradients of hidden states and projection: the module's, and plain PyTorch's in float32."""
    generator = torch.Generator().manual_seed(seed)
    head.weight.data = torch.randn(V, D, generator=generator).to(dtype)
    hidden_BLD = torch.randn(B, L, D, generator=generator).to(dtype)
    labels_BL = torch.randint(0, V, (B, L), generator=generator)
    labels_BL.view(-1)[list(masked)] = -100
    loss_fn = HeadLoss.Config(num_chunks=CHUNKS, loss_fn=CrossEntropyLoss.Config(global_vocab_size=V)).build()
    loss_fn.set_lm_head(head)
    h_BLD = hidden_BLD.clone().requires_grad_()
    loss, _ = loss_fn(h_BLD, labels_BL, torch.tensor(7))
    head.weight.grad = None
    loss.backward()
    found = [loss.detach(), h_BLD.grad, head.weight.grad]

    h_BLD = hidden_BLD.clone().requires_grad_()
    weight_VD = head.weight.detach().clone().requires_grad_()
    x_BLD, w_VD = h_BLD, weight_VD
    if isinstance(head, QATLinear):
        x_BLD, w_VD = fake_quantize_activation(x_BLD), fake_quantize_weight(w_VD, 32)
    logits_BLV = F.linear(x_BLD.float(), w_VD.float())
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="sum") / 7
    loss.backward()
    return found, [loss.detach(), h_BLD.grad, weight_VD.grad]


@pytest.mark.parametrize("kind", [Linear, QATLinear])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), masked=st.sets(st.integers(0, B * L - 1)))
def test_loss_and_gradients_are_those_of_all_logits_at_once(kind, seed, masked):
    head = kind.Config(in_features=D, out_features=V).build()
    for found, expected in zip(*compute_both(head, torch.float32, seed, masked), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Linear, QATLinear])
def test_in_bfloat16_the_projections_gradient_is_rounded_once(kind):
    head = kind.Config(in_features=D, out_features=V).build()
    (_, hidden, weight), (_, expected_hidden, expected) = compute_both(head, torch.bfloat16, 0, {3, 4, 20})
    assert hidden.dtype == weight.dtype == torch.bfloat16
    for got, wanted in ((hidden, expected_hidden), (weight, expected)):
        assert (got.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_add_up_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(5, 8, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(4)]
    total = torch.full((5, 3), torch.nan)
    for i, (a, b) in enumerate(pairs):
        add_product(total, a.to(dtype), b.to(dtype), is_first=i == 0)
    expected = sum(a.to(dtype).double() @ b.to(dtype).double() for a, b in pairs)
    torch.testing.assert_close(total, expected.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)


def test_without_gradients_it_is_the_loss_alone():
    head = Linear.Config(in_features=D, out_features=V).build()
    head.weight.data = torch.randn(V, D)
    loss_fn = HeadLoss.Config(num_chunks=CHUNKS, loss_fn=CrossEntropyLoss.Config(global_vocab_size=V)).build()
    loss_fn.set_lm_head(head)
    hidden_BLD, labels_BL = torch.randn(B, L, D), torch.randint(0, V, (B, L))
    with torch.no_grad():
        loss, _ = loss_fn(hidden_BLD, labels_BL, torch.tensor(B * L))
    torch.testing.assert_close(
        loss, F.cross_entropy(F.linear(hidden_BLD, head.weight).flatten(0, 1), labels_BL.flatten())
    )
    assert not loss.requires_grad and head.weight.grad is None
