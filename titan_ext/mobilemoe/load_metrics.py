"""Statistics of every MoE layer for TensorBoard and the metrics files: expert load, dropped tokens, router entropy, z.

The forward pass only adds to counters on this rank: torchtitan's `tokens_per_expert_E`, the router gate's `token_sums`
and the experts' `num_dropped`. `collect` reduces them over all ranks when metrics are logged. This keeps collectives
and waits for the device out of the training step.

Shape suffixes: E experts, L layers of the whole model, S statistics of a layer.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torchtitan.distributed import ParallelDims

from titan_ext.dtensor import local
from titan_ext.training.optimizers import SkippableOptimizers


def _find_moe_layers(model_parts: list[nn.Module]) -> dict[int, Any]:
    """Return this rank's MoE layers by their number in the whole model. A pipeline's stage has a part of them.

    They are `Any`, because torch types an attribute of a module as tensor or module.
    """
    parts: list[Any] = list(model_parts)
    return {int(i): block.moe for part in parts for i, block in part.layers.items()}


def register_load_recording_hook(optimizers: SkippableOptimizers, model_parts: list[nn.Module]) -> None:
    """Call `record_load` before every optimizer step, and `forget_skipped_load` after it.

    Register it before `titan_ext.mobilemoe.expert_bias.register_expert_bias_update`, which clears the counts.
    """

    def record(*args: Any, **kwargs: Any) -> None:
        record_load(model_parts)
        if optimizers.skip is not None:
            forget_skipped_load(model_parts, optimizers.skip)

    optimizers.register_step_pre_hook(record)


@torch.no_grad()
def record_load(model_parts: list[nn.Module]) -> None:
    """Add the step's token counts of this rank to the counts that the next `collect` reads."""
    for moe in _find_moe_layers(model_parts).values():
        counts_E = local(moe.tokens_per_expert_E)
        recorded_E = getattr(moe, "recorded_load_E", None)
        moe.recorded_load_E = counts_E.clone() if recorded_E is None else recorded_E + counts_E


@torch.no_grad()
def forget_skipped_load(model_parts: list[nn.Module], skip: torch.Tensor) -> None:
    """Set the token counts to zero if the update is skipped: torchtitan's hook leaves the expert bias as it is then.

    Args:
        skip: float32 [], 1.0 if the update of this step is skipped, else 0.0.
    """
    for moe in _find_moe_layers(model_parts).values():
        local(moe.tokens_per_expert_E).mul_(1 - skip)


def collect(model_parts: list[nn.Module], parallel_dims: ParallelDims) -> tuple[list[dict], dict[str, float]]:
    """Reduce the counters over all ranks, clear them and return the statistics since the last call.

    A collective: every rank must call it.

    Returns:
        A record for every layer, and the values over all layers. A record has "load" (each expert's share of the
        choices), "max_over_mean" (of the load), "entropy" and "max_entropy" (of the load, in nats), "dead" (number of
        experts without a token), "dropped" (share of the choices) and "router_entropy" (of the router's normalised
        scores, mean over tokens, in nats). The values are "router_z", the mean over tokens of logsumexp(logits)^2,
        summed over the layers, and "dropped", the mean over the layers.
    """
    layers = _find_moe_layers(model_parts)
    config: Any = model_parts[0].config
    rows = {i: _read_counters(moe).double() for i, moe in layers.items()}
    zeros_S = torch.zeros_like(next(iter(rows.values())))  # this rank's part of a layer on another pipeline stage
    sums_LS = torch.stack([rows.get(i, zeros_S) for i in range(len(config.layers))])
    for group in _list_groups(parallel_dims):
        dist.all_reduce(sums_LS, group=group)
    for moe in layers.values():
        moe.recorded_load_E = None
        moe.router.gate.token_sums.zero_()
        _find_dropped_counter(moe).zero_()
    top_k = config.layers[0].moe.router.top_k
    records = [_make_record(row_S, top_k) for row_S in sums_LS.cpu()]
    means = {
        "router_z": sum(record.pop("z") for record in records),
        "dropped": sum(record["dropped"] for record in records) / len(records),
    }
    return records, means


def _list_groups(parallel_dims: ParallelDims) -> list[dist.ProcessGroup]:
    """Return the groups to reduce over: those whose ranks have different tokens or different layers."""
    meshes = [parallel_dims.get_optional_mesh(name) for name in ("loss", "pp")]
    if parallel_dims.ep_enabled and parallel_dims.tp_enabled:  # torchtitan then splits the tokens over both
        meshes.append(parallel_dims.get_mesh("tp"))
    return [mesh.get_group() for mesh in meshes if mesh is not None]


def _read_counters(moe: Any) -> torch.Tensor:
    """Return one layer's counters [S]: E token counts, number of tokens, sums of z^2 and entropy, dropped choices."""
    return torch.cat([_read_load(moe), local(moe.router.gate.token_sums), _find_dropped_counter(moe)[None]])


def _read_load(moe: Any) -> torch.Tensor:
    recorded_E = getattr(moe, "recorded_load_E", None)  # None before the first step
    return torch.zeros_like(local(moe.tokens_per_expert_E)) if recorded_E is None else recorded_E


def _find_dropped_counter(moe: Any) -> torch.Tensor:
    """Return the layer's counter of dropped choices itself, not a copy; a new zero for a dropless layer."""
    dropped = getattr(moe.routed_experts, "num_dropped", None)  # a dropless layer has no such counter
    return torch.zeros((), device=moe.router.gate.token_sums.device) if dropped is None else local(dropped)


def _make_record(sums_S: torch.Tensor, top_k: int) -> dict:
    """Return one layer's record for `collect` from its counters, which `_read_counters` lists."""
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
