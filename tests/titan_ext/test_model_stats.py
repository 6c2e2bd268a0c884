"""Closed formulas against built models, PyTorch's FLOP counter and a real cache."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.export.dimensions import config_from_dims
from eval.hf_mobilemoe import MobileMoEForCausalLM
from tests.eval.tiny_checkpoint import DIMS
from titan_ext.config import FLAVORS
from titan_ext.mobilemoe import model_config
from titan_ext.model_stats import (
    count_parameters,
    inference_flops_per_token,
    kv_cache_bytes,
    split_layers,
    training_flops_per_token,
)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_parameters_are_those_of_the_built_model(flavor):
    dims = FLAVORS[flavor]
    with torch.device("meta"):
        model = model_config(dims).build()
    count = count_parameters(dims)
    assert count.total == sum(p.numel() for p in model.parameters())
    experts = [p for name, p in model.named_parameters() if "inner_experts" in name]
    assert count.routed_experts == sum(p.numel() for p in experts)
    assert count.active_routed_experts * dims.n_experts == count.routed_experts * dims.top_k


@pytest.mark.parametrize(("flavor", "active", "total"), [("S", 272e6, 1.3e9), ("M", 528e6, 2.8e9), ("L", 922e6, 5.3e9)])
def test_flavors_have_the_published_sizes(flavor, active, total):
    count = count_parameters(FLAVORS[flavor])
    assert count.total == pytest.approx(total, rel=0.03)
    assert count.active == pytest.approx(active, rel=0.01)


def test_flops_and_cache_are_those_of_a_forward_pass():
    config = config_from_dims(DIMS)
    config._attn_implementation = "eager"  # PyTorch does not count the CPU's fused attention
    model = MobileMoEForCausalLM(config).eval()
    length = 48
    tokens = torch.randint(0, DIMS.vocab_size, (1, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(tokens, use_cache=True)
    assert counter.get_total_flops() == length * inference_flops_per_token(DIMS, length)
    cache = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
    assert sum(x.numel() * x.element_size() for x in cache) == kv_cache_bytes(DIMS, length, bytes_per_value=4)


def test_training_flops_are_those_of_both_passes():
    config = config_from_dims(DIMS)
    config._attn_implementation = "eager"
    model = MobileMoEForCausalLM(config).train()
    length = 48
    tokens = torch.randint(0, DIMS.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    # Every token is multiplied with all `length` keys, which are half of a sequence of twice the length.
    assert counter.get_total_flops() == length * training_flops_per_token(DIMS, 2 * length)


def test_training_costs_about_six_flops_a_parameter_and_token():
    dims = FLAVORS["S"]
    assert training_flops_per_token(dims, 2048) == pytest.approx(6 * count_parameters(dims).active, rel=0.15)


@pytest.mark.parametrize(
    ("flavor", "layers"),
    # The projection is as 11.3 layers of S (98.5M to 8.7M active parameters), 8.6 of M, 2.1 of tiny.
    [("S", [20]), ("S", [16, 4]), ("S", [7, 6, 6, 1]), ("M", [17, 9]), ("tiny", [1, 1, 1, 1])],
)
def test_stages_of_a_pipeline_share_layers_and_projection_evenly(flavor, layers):
    assert split_layers(FLAVORS[flavor], len(layers)) == layers


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="5 pipeline stages: a model of 4 layers has no layer for each"):
        split_layers(FLAVORS["tiny"], 5)
