"""Bytes of the exported weights, from the dimensions alone."""

from math import prod

from eval.export.dimensions import config_from_dims
from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32, packed_tensors, tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import quantization_of
from titan_ext.config import ModelDims


def bf16_bytes(dims: ModelDims) -> int:
    """Tensor data of a bf16 folder's safetensors files, router float32; their headers, some kB, come on top."""
    shapes = tensor_shapes(config_from_dims(dims))
    return sum(prod(shape) * (4 if kept_in_float32(name) else 2) for name, shape in shapes.items())


def int4_bytes(dims: ModelDims, group_size: int = 32, expert_group_axis: str = "in") -> int:
    """Tensor data of an INT4 folder: half a byte a weight and a float16 scale a group; router float32, rest bf16."""
    config = config_from_dims(dims)
    packed = packed_tensors(config, quantization_of(group_size, expert_group_axis))
    total = 0
    for name, shape in tensor_shapes(config).items():
        if name in packed:
            total += prod(shape) // 2 + 2 * prod(shape) // packed[name].group_size
        else:
            total += prod(shape) * (4 if name.endswith("router.weight") else 2)
    return total
