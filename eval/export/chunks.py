"""`map_chunks`: compute with a large tensor a part at a time, so that intermediate results stay small."""

from collections.abc import Callable

import torch

MAX_CHUNK_VALUES = 1 << 20
"""Number of values of the first tensor that are computed with at once; 4 MB in float32."""


def map_chunks(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """Return `function(*tensors)`, computed over parts of the first axis.

    Args:
        function: computes each index of the first axis by itself.
        tensors: of one length along the first axis; at least one value.
    """
    first = tensors[0]
    length = max(1, MAX_CHUNK_VALUES * first.shape[0] // first.numel())
    out: torch.Tensor | None = None
    for start in range(0, first.shape[0], length):
        part = function(*(tensor[start : start + length] for tensor in tensors))
        if length >= first.shape[0]:
            return part.contiguous()
        if out is None:
            out = part.new_empty(first.shape[0], *part.shape[1:])
        out[start : start + length] = part
    assert out is not None, "a tensor has at least one value"
    return out
