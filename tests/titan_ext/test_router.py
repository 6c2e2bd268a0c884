"""The router against torchtitan's own: the same choices, weights and gradients, and no additions into scores."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.common.moe import TokenChoiceTopKRouter

from titan_ext.config import FLAVORS
from titan_ext.mobilemoe import model_config
from titan_ext.mobilemoe.router import Router


class WatchOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def build(kind: type, **options) -> torch.nn.Module:
    """Either router with the same weights; it is in evaluation mode, where the gate keeps no statistics."""
    layers = model_config(dataclasses.replace(FLAVORS["tiny"], n_layers=1)).layers
    config = layers[0].moe.router
    assert isinstance(config, Router.Config)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    router = kind.Config(**(fields | options)).build().eval()
    weight = router.gate.weight
    torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return router


@pytest.mark.parametrize("route_norm", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_choices_weights_and_gradients_are_torchtitans(has_bias, route_norm):
    x_BLD = torch.randn(2, 33, FLAVORS["tiny"].d_model, generator=torch.Generator().manual_seed(1))
    bias_E = torch.linspace(-0.2, 0.2, FLAVORS["tiny"].n_experts) if has_bias else None
    results, names = [], []
    for kind in (Router, TokenChoiceTopKRouter):
        router, x = build(kind, route_norm=route_norm), x_BLD.clone().requires_grad_()
        with WatchOperations() as watch:
            weights_BLK, ids_BLK, scores_BLE = router(x, bias_E)
            (weights_BLK.square().sum() + scores_BLE.sum()).backward()
        results.append([weights_BLK, ids_BLK, scores_BLE, x.grad, router.gate.weight.grad])
        names.append([name for name in watch.names if "scatter_add" in name])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert names[0] == [] and names[1], names
