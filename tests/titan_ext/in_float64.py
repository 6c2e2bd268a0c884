"""Makes a rank's process train in float64, so that another implementation can be followed over many steps.

In float32 the two part after some steps: where the scores of two experts nearly tie, a rounding decides. What changes
here is dtypes, and the grouped product, which PyTorch has in float32 at most. The rest is the code that trains.
"""

from typing import Any

import torch
import torch.distributed as dist
import torchtitan.components.loss as titan_loss
from torch.distributed.fsdp import MixedPrecisionPolicy
from torchtitan.config import TORCH_DTYPE_MAP

from titan_ext.dtensor import local
from titan_ext.mobilemoe import moe, parallelize
from titan_ext.quantization import formulas
from titan_ext.training import metrics
from titan_ext.training.callbacks import Callback
from titan_ext.training.stage_spec import StageSpec
from titan_ext.training.train import build_trainer


class BiasRecorder(Callback):
    """Adds the expert bias of every layer to the lines of metrics.jsonl."""

    def __init__(self, model: torch.nn.Module):
        self._layers = model.layers

    def metrics(self) -> dict[str, float]:
        return {
            f"bias/{layer}_{expert}": value
            for layer, block in self._layers.items()
            for expert, value in enumerate(local(block.moe.expert_bias_E).tolist())
        }


def train_in_float64(spec: StageSpec) -> None:
    """Run a stage on this rank, and log every expert's load and bias at every step."""
    compute_in_float64()
    metrics.LOAD_LOGS = 1
    trainer = build_trainer(spec)
    trainer.callbacks.append(BiasRecorder(trainer.model_parts[0]))
    trainer.train()
    trainer.close()
    dist.destroy_process_group()


def compute_in_float64() -> None:
    """Change this process for good: call it in a process of its own, before the trainer is built."""
    TORCH_DTYPE_MAP["float32"] = torch.float64
    to_float32, round_scale, accumulator = torch.Tensor.float, formulas.round_scale, titan_loss.GradAccumulator

    def widen(x: torch.Tensor) -> torch.Tensor:
        return to_float32(x) if x.dtype == torch.bool else x.double()  # fused optimizers read a flag as float32

    torch.Tensor.float = widen
    formulas.round_scale = lambda scale: round_scale(scale.to(torch.float32))  # it works on the bits of a float32
    titan_loss.GradAccumulator = lambda x, **options: accumulator(x, **options | {"dtype": torch.float64})
    parallelize.MixedPrecisionPolicy = lambda **dtypes: MixedPrecisionPolicy(**dict.fromkeys(dtypes, torch.float64))
    moe.multiply_grouped = multiply_by_expert


def multiply_by_expert(experts: Any, a_RK: torch.Tensor, b_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Return what `titan_ext.compat.multiply_grouped` returns, one product an expert."""
    sizes = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).tolist()
    return torch.cat([a @ b for a, b in zip(a_RK.split(sizes), b_EKN, strict=True)])
