"""Expert load, imbalance, drops and router statistics of every MoE layer, for TensorBoard and the metrics files."""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from titan_ext.dtensor import local


def _moe_layers(model_parts: list[nn.Module]) -> dict[int, nn.Module]:
    """By their number in the whole model, of which a pipeline's stage has a part."""
    return {int(i): block.moe for part in model_parts for i, block in part.layers.items()}


def register_load_recording_hook(optimizers: OptimizersContainer, model_parts: list[nn.Module]) -> None:
    """Keep the token counts that torchtitan's load-balancing hook clears at every step, until metrics are logged."""

    optimizers.register_step_pre_hook(lambda *args, **kwargs: record_load(model_parts))


@torch.no_grad()
def record_load(model_parts: list[nn.Module]) -> None:
    """Add the token counts of this rank's step to those that the metrics are taken of."""
    for moe in _moe_layers(model_parts).values():
        counts_E = local(moe.tokens_per_expert_E)
        recorded_E = getattr(moe, "recorded_load_E", None)
        moe.recorded_load_E = counts_E.clone() if recorded_E is None else recorded_E + counts_E


@torch.no_grad()
def clear_load(model_parts: list[nn.Module]) -> None:
    """Forget the token counts that the next update of the expert bias would be made of."""
    for moe in _moe_layers(model_parts).values():
        local(moe.tokens_per_expert_E).zero_()


def collect(model_parts: list[nn.Module], parallel_dims: ParallelDims) -> tuple[list[dict], dict[str, float]]:
    """Reduce and clear what was recorded since the last call. A collective: every rank must call it.

    Returns:
        For every layer its load (share of the routed tokens an expert was chosen by), max/mean, entropy of the load in
        nats and its maximum, experts without a token, share of the choices that were dropped, entropy of the router's
        normalised scores (nats a token); and over all layers: z, the mean over tokens of logsumexp(logits)^2 summed
        over layers, and the dropped share.
    """
    layers = _moe_layers(model_parts)
    config = model_parts[0].config
    rows = {i: _statistics(moe).double() for i, moe in layers.items()}
    elsewhere_S = torch.zeros_like(next(iter(rows.values())))
    sums_LS = torch.stack([rows.get(i, elsewhere_S) for i in range(len(config.layers))])
    for group in _groups(parallel_dims):
        dist.all_reduce(sums_LS, group=group)
    for moe in layers.values():
        moe.recorded_load_E = None
        moe.router.gate.token_sums.zero_()
        _num_dropped(moe).zero_()
    top_k = config.layers[0].moe.router.top_k
    records = [_layer_record(row_S, top_k) for row_S in sums_LS.cpu()]
    means = {
        "router_z": sum(record.pop("z") for record in records),
        "dropped": sum(record["dropped"] for record in records) / len(records),
    }
    return records, means


def _groups(parallel_dims: ParallelDims) -> list[dist.ProcessGroup]:
    """The groups whose ranks see different tokens, or have different layers."""
    meshes = [parallel_dims.get_optional_mesh(name) for name in ("loss", "pp")]
    if parallel_dims.ep_enabled and parallel_dims.tp_enabled:  # torchtitan then spreads the tokens over both
        meshes.append(parallel_dims.get_mesh("tp"))
    return [mesh.get_group() for mesh in meshes if mesh is not None]


def _statistics(moe: nn.Module) -> torch.Tensor:
    return torch.cat([_load(moe), local(moe.router.gate.token_sums), _num_dropped(moe)[None]])


def _load(moe: nn.Module) -> torch.Tensor:
    recorded_E = getattr(moe, "recorded_load_E", None)  # None before the first step
    return torch.zeros_like(local(moe.tokens_per_expert_E)) if recorded_E is None else recorded_E


def _num_dropped(moe: nn.Module) -> torch.Tensor:
    dropped = getattr(moe.routed_experts, "num_dropped", None)  # a dropless layer has no such counter
    return torch.zeros((), device=moe.router.gate.token_sums.device) if dropped is None else local(dropped)


def _layer_record(sums_S: torch.Tensor, top_k: int) -> dict:
    """One layer's statistics of [E token counts, tokens, sum of z^2, sum of entropy, dropped choices]."""
    counts_E, (num_tokens, z_squares, entropy, dropped) = sums_S[:-4], sums_S[-4:].tolist()
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return {
        "load": [round(x, 6) for x in share_E.tolist()],
        "max_over_mean": float(share_E.max() * len(share_E)),
        "entropy": float(-torch.xlogy(share_E, share_E).sum()),
        "max_entropy": math.log(len(share_E)),
        "dead": int((counts_E == 0).sum()),
        "dropped": dropped / max(num_tokens * top_k, 1),
        "router_entropy": entropy / max(num_tokens, 1),
        "z": z_squares / max(num_tokens, 1),
    }
