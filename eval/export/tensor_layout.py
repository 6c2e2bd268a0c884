"""Dtype and shape of every tensor of a folder that is to be written, known before the first one is read.

A safetensors file begins with the places of all its tensors. So a folder is planned first, and then its tensors are
written one by one.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from eval.hf_mobilemoe.checkpoint_mobilemoe import kept_in_float32, packed_tensors, tensor_shapes
from eval.hf_mobilemoe.configuration_mobilemoe import MobileMoEConfig


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


TensorLayout = dict[str, TensorSpec]
"""Name -> dtype and shape, in the order in which the tensors fill the shards of a folder."""


def describe_folder(config: MobileMoEConfig, order: Iterable[str] = ()) -> TensorLayout:
    """Return the tensors of a folder of `config`: floats of `config.dtype`, or the INT4 tensors of its `quantization`.

    Args:
        order: names of an unquantized checkpoint's tensors in the order in which they come; those that are left out
            follow in the order of the network.
    """
    shapes = tensor_shapes(config)
    packed = packed_tensors(config, config.quantization) if config.quantization is not None else {}
    layout: TensorLayout = {}
    for name in dict.fromkeys((*order, *shapes)):
        if name in packed:
            part_shapes = packed[name].packed_shapes()
            for part, dtype in ((packed[name].qweight_name, torch.uint8), (packed[name].scale_name, torch.float16)):
                layout[part] = TensorSpec(dtype, part_shapes[part])
        elif name in shapes:
            layout[name] = TensorSpec(choose_dtype(name, config), shapes[name])
    return layout


def choose_dtype(name: str, config: MobileMoEConfig) -> torch.dtype:
    """Return the dtype in which a folder of `config` stores a tensor that is not packed.

    In a folder of floats, the router's weight and the expert bias are float32 whatever the model's dtype is.
    """
    if config.quantization is not None:
        return choose_dtype_beside_int4(name)
    assert isinstance(config.dtype, torch.dtype), "the dtype of a folder of floats has been chosen"
    return torch.float32 if kept_in_float32(name) else config.dtype


def choose_dtype_beside_int4(name: str) -> torch.dtype:
    """Return the dtype of a tensor that an INT4 folder does not pack: the router's weight float32, others bfloat16."""
    return torch.float32 if name.endswith("router.weight") else torch.bfloat16
