"""Access to the local part of a DTensor, which all parts of titan_ext need."""

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of a DTensor, sharing its memory; return a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
