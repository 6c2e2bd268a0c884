"""The one description of the quantization that a run trains and exports; imports no torch."""

from dataclasses import dataclass
from typing import Literal

FLOAT8_MULTIPLE = 16
"""Every dimension of a float8 product, and every expert's number of rows, is a multiple of it: 16 bytes."""


@dataclass(frozen=True)
class QuantizationConfig:
    """Groups of the symmetric INT4 weights; activations are INT8, with a range of their own for every token.

    Quantization-aware training and the INT4 exports of a run take the same one, so that the exported grid is the
    trained one. `titan_ext.quantization.formulas` holds the arithmetic.
    """

    group_size: int = 32
    """Number of consecutive weights that share a scale; divides every quantized dimension."""
    expert_group_axis: Literal["in", "out"] = "in"
    """Axis of the experts' weights that is grouped. `in` is the input dimension, which the device's fused op needs;
    `out` is the output dimension, which the released checkpoints have."""
    expert_group_size: int | None = None
    """Number of weights that share a scale in the routed experts; None takes `group_size`. Larger groups save the
    device 8 bytes of scales a group."""

    @property
    def resolved_expert_group_size(self) -> int:
        """Number of weights that share a scale in the routed experts."""
        return self.expert_group_size or self.group_size
