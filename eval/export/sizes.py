"""Predicting the bytes of exported weights from the dimensions alone. Imports neither torch nor transformers."""

from titan_ext.config import ModelDims
from titan_ext.model_stats import count_parameters


def bf16_bytes(dims: ModelDims) -> int:
    """Return the bytes of tensor data in a bf16 folder's safetensors files; their headers are some kB more.

    Router and expert bias are float32, the rest is bfloat16.
    """
    count = count_parameters(dims)
    return 2 * (count.total - count.router) + 4 * (count.router + _expert_biases(dims))


def int4_bytes(dims: ModelDims, group_size: int = 32) -> int:
    """Return the bytes of tensor data in an INT4 folder: half a byte a weight and a float16 scale a group.

    The router is float32, the rest bfloat16. The number is the same whichever axis of the experts is grouped;
    `group_size` divides every grouped dimension.
    """
    count = count_parameters(dims)
    quantized = count.total - count.router - count.norms
    return quantized // 2 + 2 * quantized // group_size + 4 * count.router + 2 * (count.norms + _expert_biases(dims))


def _expert_biases(dims: ModelDims) -> int:
    return dims.n_layers * dims.n_experts
