"""Bytes of the exported weights, from the dimensions alone; imports neither torch nor transformers."""

from titan_ext.config import ModelDims
from titan_ext.model_stats import count_parameters


def bf16_bytes(dims: ModelDims) -> int:
    """Tensor data of a bf16 folder's safetensors files, router and expert bias float32; some kB of headers on top."""
    count = count_parameters(dims)
    return 2 * (count.total - count.router) + 4 * (count.router + _expert_biases(dims))


def int4_bytes(dims: ModelDims, group_size: int = 32) -> int:
    """Tensor data of an INT4 folder: half a byte a weight and a float16 scale a group; router float32, rest bf16.

    It is the same whichever axis of the experts is grouped; `group_size` divides every grouped dimension.
    """
    count = count_parameters(dims)
    quantized = count.total - count.router - count.norms
    return quantized // 2 + 2 * quantized // group_size + 4 * count.router + 2 * (count.norms + _expert_biases(dims))


def _expert_biases(dims: ModelDims) -> int:
    return dims.n_layers * dims.n_experts
