"""INT4 quantization-aware training: fake-quantized weights and activations for every matrix of the model.

Weights and activations are rounded by `titan_ext.quantization.formulas`; the gradient passes through the rounding
unchanged. Norms and router stay float32. In training the weights arrive rounded (`titan_ext.quantization.shards`).

Shape suffixes: see titan_ext/mobilemoe/moe.py.
"""

from dataclasses import dataclass, fields
from typing import Any

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torchtitan.models.common import Embedding, Linear

from core.errors import RefusedInput
from titan_ext import compat
from titan_ext.cpu.kernels import fuse_if_large
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.mobilemoe.moe import Experts, RouterGate
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.formulas import round_to_int4, round_to_int8


def fake_quantize_weight(weight: torch.Tensor, group_size: int, axis: int = -1) -> torch.Tensor:
    """Return `weight` rounded to the INT4 grid, group by group along `axis`; the gradient is 1 everywhere.

    Args:
        weight: float, any shape; the size along `axis` is a multiple of `group_size`.

    Returns:
        The dequantized values, in the weight's dtype and shape.

    Raises:
        RefusedInput: the size along `axis` is no multiple of `group_size`.
    """
    if weight.shape[axis] % group_size:
        raise RefusedInput(
            f"weight {tuple(weight.shape)}: {weight.shape[axis]} values along axis {axis} are no multiple of "
            f"group_size {group_size}; choose dimensions that are"
        )
    with torch.no_grad():
        rounded = _round_weight(weight, group_size, axis)
    return _StraightThrough.apply(weight, rounded)


@fuse_if_large
def _round_weight(weight: torch.Tensor, group_size: int, axis: int) -> torch.Tensor:
    return round_to_int4(weight, axis, group_size).to(weight.dtype)


@spmd.register_local_autograd_function
class _StraightThrough(torch.autograd.Function):
    """The function returns the rounded values, and hands their gradient to the unrounded ones.

    Unlike `x + (rounded - x).detach()` it passes over no value.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def fake_quantize_activation(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with every token (last dimension) rounded to its own INT8 grid; the gradient is 1 everywhere."""
    with torch.no_grad():
        rounded = _round_tokens(x)
    return _StraightThrough.apply(x, rounded)


@fuse_if_large
def _round_tokens(x: torch.Tensor) -> torch.Tensor:
    return round_to_int8(x).to(x.dtype)


class QATModule:
    """The part that all modules with INT4 weights share."""

    group_size: int
    axis: int = -1
    """Axis of the weights that is grouped."""
    rounds_weights: bool = True
    """False where the weights are rounded before they arrive here (`titan_ext.quantization.shards`)."""

    def round_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the values to compute with, for a weight or rows of one."""
        return fake_quantize_weight(weight, self.group_size, self.axis) if self.rounds_weights else weight


class QATLinear(QATModule, Linear):
    """Linear with INT4 weights grouped along the input dimension and INT8 activations."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        group_size: int = 32

    def __init__(self, config: Config):
        super().__init__(config)
        self.group_size = config.group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(fake_quantize_activation(input), self.round_weight(self.weight), self.bias)


class QATEmbedding(QATModule, Embedding):
    """Embedding with INT4 rows: the same grid as the output projection that it is tied to."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        group_size: int = 32

    def __init__(self, config: Config):
        super().__init__(config)
        self.group_size = config.group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Only the rows that are looked up are rounded: a row's groups do not depend on other rows.
        return self.round_weight(F.embedding(input, self.weight))


class QATExperts(QATModule, Experts):
    """Routed experts with INT4 weights and INT8 activations in front of both GEMMs."""

    @dataclass(kw_only=True, slots=True)
    class Config(Experts.Config):
        group_size: int = 32
        group_axis: str = "in"

    def __init__(self, config: Config):
        super().__init__(config)
        self.group_size = config.group_size
        # Stored [E, out, in]: the input dimension is the last.
        self.axis = {"in": -1, "out": -2}[config.group_axis]

    def local_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, down, up = (self.round_weight(weight) for weight in super().local_weights())
        return gate, down, up

    def quantize_input(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize_activation(x)


_QAT_CLASSES = ((Linear, QATLinear), (Embedding, QATEmbedding), (Experts, QATExperts))


def convert_to_qat(config: MobileMoEModel.Config, quantization: QuantizationConfig) -> MobileMoEModel.Config:
    """Replace, in place, every linear, embedding and expert config but the router's by its fake-quantized kind.

    The compiler's code for GPUs then divides as exactly as uncompiled code does. By default it divides approximately,
    and where a scale lies between two bfloat16 numbers, training would round to another grid than is exported.

    Returns:
        `config` itself.
    """
    compat.divide_exactly()
    for plain_class, qat_class in _QAT_CLASSES:
        options: dict[str, Any] = {"group_size": quantization.group_size}
        if qat_class is QATExperts:
            options = {
                "group_size": quantization.resolved_expert_group_size,
                "group_axis": quantization.expert_group_axis,
            }
        for _, old, parent, attribute in list(config.traverse(plain_class.Config)):
            if isinstance(old, RouterGate.Config):
                continue
            new = qat_class.Config(**{f.name: getattr(old, f.name) for f in fields(old)}, **options)
            if isinstance(parent, list):
                parent[attribute] = new
            else:
                setattr(parent, attribute, new)
    return config
