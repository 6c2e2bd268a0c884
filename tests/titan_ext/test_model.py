"""The torchtitan model against the plain reference: logits, packed documents, router, z-loss, names."""

import dataclasses

import pytest
import torch

from tests.titan_ext import reference
from titan_ext.config import ModelDims
from titan_ext.mobilemoe import MobileMoEStateDictAdapter, model_config

DIMS = ModelDims(
    d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, expert_hidden=32, shared_hidden=64, n_experts=8,
    top_k=4, vocab_size=96, max_seq_len=64,
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = model_config(DIMS).build()
    model.init_states()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than at initialisation, so that routing and softmax are far from uniform.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
        for block in model.layers.values():
            block.moe.expert_bias_E.normal_(0, 0.2)
    return model.eval()


def released_names(model) -> dict[str, torch.Tensor]:
    return MobileMoEStateDictAdapter(model.config, None).to_hf(model.state_dict())


def test_logits_equal_the_plain_reference(model):
    tokens = torch.randint(0, DIMS.vocab_size, (1, 24))
    ours_LV = model(tokens, positions=torch.arange(24)[None])[0]
    theirs_LV = reference.logits(tokens[0].tolist(), released_names(model), DIMS)
    torch.testing.assert_close(ours_LV, theirs_LV, rtol=1e-4, atol=1e-4)


def test_packed_documents_do_not_see_each_other(model):
    first, second = torch.randint(0, DIMS.vocab_size, (9,)), torch.randint(0, DIMS.vocab_size, (13,))
    positions = torch.cat([torch.arange(9), torch.arange(13)])[None]
    packed_LV = model(torch.cat([first, second])[None], positions=positions)[0]
    for document, ours_LV in ((first, packed_LV[:9]), (second, packed_LV[9:])):
        theirs_LV = reference.logits(document.tolist(), released_names(model), DIMS)
        torch.testing.assert_close(ours_LV, theirs_LV, rtol=1e-4, atol=1e-4)


def test_expert_bias_changes_the_choice_but_not_the_weights(model):
    moe = model.layers["0"].moe
    x_BLD = torch.randn(1, 16, DIMS.d_model)
    with torch.no_grad():
        moe.expert_bias_E.zero_()
        moe.expert_bias_E[5] = 10.0
        scores_BLK, ids_BLK, all_scores_BLE = moe.router(x_BLD, moe.expert_bias_E)
    assert (ids_BLK == 5).any(-1).all(), "an expert with a large bias is chosen by every token"
    chosen = all_scores_BLE.gather(-1, ids_BLK)
    torch.testing.assert_close(scores_BLK, chosen / chosen.sum(-1, keepdim=True) * DIMS.route_scale)


def test_router_computes_in_float32_whatever_the_activations(model):
    gate = model.layers["0"].moe.router.gate
    x_BLD = torch.randn(1, 4, DIMS.d_model).bfloat16()
    logits_BLE = gate(x_BLD)
    assert logits_BLE.dtype == torch.float32
    torch.testing.assert_close(logits_BLE, (x_BLD.double() @ gate.weight.double().T).float())


def test_experts_of_a_rank_without_tokens_get_a_zero_gradient(model):
    experts = model.layers["0"].moe.routed_experts.inner_experts
    x_RD = torch.zeros(0, DIMS.d_model, requires_grad=True)
    out_RD = experts(x_RD, torch.zeros(DIMS.n_experts, dtype=torch.int64))
    out_RD.sum().backward()
    assert out_RD.shape == x_RD.grad.shape == (0, DIMS.d_model)
    assert all(torch.equal(w.grad, torch.zeros_like(w)) for w in experts.parameters())


def test_z_loss_gradient_is_that_of_the_formula():
    from titan_ext.mobilemoe.router_z_loss import attach_router_z_loss

    torch.manual_seed(0)
    logits = torch.randn(2, 5, 8, requires_grad=True)
    upstream = torch.randn(2, 5, 8)
    out = attach_router_z_loss(logits, 0.3, num_tokens=40)
    (out * upstream).sum().backward()
    same = logits.detach().clone().requires_grad_()
    ((same * upstream).sum() + 0.3 * same.exp().sum(-1).log().pow(2).sum() / 40).backward()
    assert torch.equal(out, logits)
    torch.testing.assert_close(logits.grad, same.grad)


def test_adapter_round_trip_is_lossless_and_refuses_other_models(model):
    adapter = MobileMoEStateDictAdapter(model.config, None)
    state = model.state_dict()
    back = adapter.from_hf(adapter.to_hf(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight"):
        adapter.from_hf({"model.layers.0.self_attn.q_norm.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"layers\.0\.feed_forward\.w1\.weight"):
        adapter.to_hf({"layers.0.feed_forward.w1.weight": torch.zeros(1)})


@pytest.fixture
def build_layer():
    """Return a function that gives the MoE layer of a model with some dimensions changed, and its released names."""

    def build(**changes):
        torch.manual_seed(0)
        dims = dataclasses.replace(DIMS, shared_hidden=0, **changes)
        model = model_config(dims).build()
        model.init_states()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        names = {name.removeprefix("model.layers.0."): value for name, value in released_names(model).items()}
        assert not any("shared_expert" in name for name in names)
        return model.eval().layers["0"].moe, names, dims

    return build


def test_one_expert_without_a_shared_one_is_a_dense_model(build_layer):
    moe, names, _ = build_layer(n_experts=1, top_k=1, route_scale=1.0)
    x_BLD = torch.randn(1, 9, DIMS.d_model)
    gate_up_D2F, down_FD = (names[f"feed_forward.experts.{name}_proj"][0] for name in ("gate_up", "down"))
    gate_BLF, up_BLF = (x_BLD @ gate_up_D2F).chunk(2, dim=-1)
    torch.testing.assert_close(
        moe(x_BLD), (torch.nn.functional.silu(gate_BLF) * up_BLF) @ down_FD, rtol=1e-4, atol=1e-5
    )


def test_a_model_without_a_shared_expert_equals_the_reference(build_layer):
    moe, names, dims = build_layer(n_experts=4, top_k=1)
    empty = {"gate_proj": (0, dims.d_model), "up_proj": (0, dims.d_model), "down_proj": (dims.d_model, 0)}
    names |= {f"feed_forward.shared_expert.{name}.weight": torch.zeros(shape) for name, shape in empty.items()}
    x_BLD = torch.randn(1, 9, DIMS.d_model)
    expected_LD = torch.stack([reference.moe(x_D, names, dims) for x_D in x_BLD[0]])
    torch.testing.assert_close(moe(x_BLD)[0], expected_LD, rtol=1e-4, atol=1e-4)
