"""Drop-and-pad and dropless dispatch against a plain loop over experts."""

import pytest
import torch

from tests.titan_ext.test_model import DIMS
from titan_ext.mobilemoe import model_config


def build_moe(capacity_factor: float | None):
    torch.manual_seed(0)
    model = model_config(DIMS, capacity_factor=capacity_factor).build()
    model.init_states()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
        for block in model.layers.values():
            block.moe.expert_bias_E.normal_(0, 0.6)
    return model.layers["0"].moe


def plain_moe(moe, x_BLD: torch.Tensor, capacity: int | None) -> tuple[torch.Tensor, int]:
    """Return the layer's output [B, L, D] and the number of dropped choices, computed expert by expert.

    An expert takes the `capacity` tokens with the highest weights; None: all tokens.
    """
    x_TD = x_BLD.flatten(0, 1)
    scores_TE = torch.sigmoid(x_TD @ moe.router.gate.weight.T)
    chosen_TK = (scores_TE + moe.expert_bias_E).topk(DIMS.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, chosen_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * DIMS.route_scale
    experts, out, dropped = moe.routed_experts.inner_experts, [torch.zeros_like(x) for x in x_TD], 0
    for e in range(DIMS.n_experts):
        takers = [(float(weights_TK[t, k].detach()), t, k) for t, k in (chosen_TK == e).nonzero().tolist()]
        takers.sort(reverse=True)
        kept = takers[:capacity]
        dropped += len(takers) - len(kept)
        for _, t, k in kept:
            hidden = torch.nn.functional.silu(experts.w1_EFD[e] @ x_TD[t]) * (experts.w3_EFD[e] @ x_TD[t])
            out[t] = out[t] + weights_TK[t, k] * (experts.w2_EDF[e] @ hidden)
    shared = moe.shared_experts
    shared_TD = shared.w2(torch.nn.functional.silu(shared.w1(x_TD)) * shared.w3(x_TD))
    return (torch.stack(out) + shared_TD).view_as(x_BLD), dropped


@pytest.mark.parametrize(("factor", "capacity"), [(1.0, 20), (1.5, 30), (8.0, 40), (None, None)])
def test_values_gradients_and_drops_are_those_of_the_plain_loop(factor, capacity):
    moe = build_moe(factor)
    x_BLD = torch.randn(2, 20, DIMS.d_model, requires_grad=True)
    out_BLD = moe(x_BLD)
    expected_BLD, dropped = plain_moe(moe, x_BLD, capacity)
    torch.testing.assert_close(out_BLD, expected_BLD, rtol=1e-4, atol=1e-4)
    if factor is not None:
        assert moe.routed_experts.num_dropped == dropped
        assert (dropped > 0) == (factor < 2), "this routing is uneven enough to drop at 1.5 and not at 8"
    upstream_BLD = torch.randn_like(out_BLD)
    wanted = [x_BLD, *moe.parameters()]
    ours = torch.autograd.grad((out_BLD * upstream_BLD).sum(), wanted)
    theirs = torch.autograd.grad((expected_BLD * upstream_BLD).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_outside_training_nothing_is_dropped():
    tight, dropless = build_moe(1.0), build_moe(None)
    x_BLD = torch.randn(1, 40, DIMS.d_model)
    assert not torch.allclose(tight(x_BLD), dropless(x_BLD))
    before = tight.eval().routed_experts.num_dropped.clone()
    torch.testing.assert_close(tight(x_BLD), dropless.eval()(x_BLD))
    assert tight.routed_experts.num_dropped == before
    assert not torch.allclose(tight.train()(x_BLD), dropless(x_BLD)), "and training drops again"
