"""Expert load, imbalance and router z-loss of every MoE layer, for TensorBoard and the run's metrics files."""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer


def _moe_layers(model_parts: list[nn.Module]) -> list[nn.Module]:
    return [block.moe for part in model_parts for block in part.layers.values()]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def register_load_recording_hook(optimizers: OptimizersContainer, model_parts: list[nn.Module]) -> None:
    """Keep the token counts that torchtitan's load-balancing hook clears at every step, until metrics are logged."""

    def record(*args, **kwargs) -> None:
        with torch.no_grad():
            for moe in _moe_layers(model_parts):
                counts_E = _local(moe.tokens_per_expert_E)
                recorded_E = getattr(moe, "recorded_load_E", None)
                moe.recorded_load_E = counts_E.clone() if recorded_E is None else recorded_E + counts_E

    optimizers.register_step_pre_hook(record)


def collect(model_parts: list[nn.Module], num_tokens: int, group: dist.ProcessGroup | None) -> tuple[list[dict], float]:
    """Reduce and clear what was recorded since the last call. A collective: every rank must call it.

    Args:
        num_tokens: tokens that all ranks processed since the last call.
        group: the ranks that see different tokens; None where one rank sees them all.

    Returns:
        For every layer its load (share of the routed tokens per expert), max/mean, entropy in nats and the number of
        experts without a token; and the mean over tokens of logsumexp(logits)^2, summed over layers.
    """
    layers = _moe_layers(model_parts)
    z_sums = [moe.router.gate.z_sum for moe in layers]
    packed = torch.cat([*(moe.recorded_load_E for moe in layers), torch.stack([_local(z) for z in z_sums])])
    if group is not None:
        dist.all_reduce(packed, group=group)
    for moe, z_sum in zip(layers, z_sums, strict=True):
        moe.recorded_load_E = None
        z_sum.zero_()
    load_LE = packed[: -len(layers)].view(len(layers), -1).double()
    return [_layer_statistics(load_E) for load_E in load_LE], float(packed[-len(layers) :].sum()) / num_tokens


def _layer_statistics(counts_E: torch.Tensor) -> dict:
    share_E = counts_E / counts_E.sum()
    used = share_E[share_E > 0]
    return {
        "load": [round(x, 6) for x in share_E.tolist()],
        "max_over_mean": float(share_E.max() * len(share_E)),
        "entropy": float(-(used * used.log()).sum()),
        "max_entropy": math.log(len(share_E)),
        "dead": int((counts_E == 0).sum()),
    }
