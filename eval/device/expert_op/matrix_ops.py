"""This module declares the operators over one packed matrix: `mobilemoe::quantized_embedding` and `quantized_linear`.

Embedding and output projection are one matrix, and a program that uses these two operators stores it once. The library
of `eval.device.expert_op` has their kernels. The linear rounds its input to INT8 with a range for each token, as
XNNPACK's linears and the experts do.

Shape suffixes: N rows, K columns of the matrix.
"""

import ctypes
import functools

import torch
from torch import nn

from eval.device import expert_op
from eval.device.expert_blobs import blob_bytes, pack_blobs

_SIZES = "Tensor packed, int rows, int columns, int group_size"


class SharedMatrix:
    """INT4 values and float16 scales of a matrix, packed once for an embedding and a linear."""

    def __init__(self, q_NK: torch.Tensor, scale_NG: torch.Tensor):
        declare()
        self.packed = pack_blobs(q_NK[None], scale_NG[None])[0]
        self.sizes = (*q_NK.shape, q_NK.shape[1] // scale_NG.shape[1])


class PackedModule(nn.Module):
    """A module over a packed matrix. The modules of one matrix share its memory."""

    packed: torch.Tensor

    def __init__(self, matrix: SharedMatrix):
        super().__init__()
        self.sizes = matrix.sizes
        self.register_buffer("packed", matrix.packed)


class PackedEmbedding(PackedModule):
    """The rows of a packed matrix, by their numbers."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., K] for int64 ids [...]."""
        return torch.ops.mobilemoe.quantized_embedding(ids, self.packed, *self.sizes)


class PackedLinear(PackedModule):
    """The products of a packed matrix with INT8 activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., N] for float32 x [..., K]."""
        return torch.ops.mobilemoe.quantized_linear(x, self.packed, *self.sizes)


@functools.cache
def declare() -> torch.library.Library:
    """Declare the two operators to torch, so that a model can call them; every `SharedMatrix` does this."""
    library = torch.library.Library("mobilemoe", "FRAGMENT")
    for name, first, compute in (("embedding", "ids", _look_up), ("linear", "x", _multiply)):
        schema = f"(Tensor {first}, {_SIZES}"
        library.define(f"quantized_{name}{schema}) -> Tensor")
        library.define(f"quantized_{name}.out{schema}, *, Tensor(a!) out) -> Tensor(a!)")
        library.impl(f"quantized_{name}", compute, "CPU")
        library.impl(f"quantized_{name}.out", lambda *_, out: out, "Meta")
    library.impl("quantized_embedding", lambda ids, packed, rows, k, group: _new(ids.shape, k, ids.device), "Meta")
    library.impl("quantized_linear", lambda x, packed, rows, k, group: _new(x.shape[:-1], rows, x.device), "Meta")
    return library


def _new(shape: torch.Size, width: int, device: torch.device) -> torch.Tensor:
    return torch.empty((*shape, width), dtype=torch.float32, device=device)


def _look_up(ids: torch.Tensor, packed: torch.Tensor, rows: int, k: int, group_size: int) -> torch.Tensor:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise ValueError(f"ids are {int(ids.min())} to {int(ids.max())}: give 0 to {rows - 1}, rows of the embedding")
    out = _new(ids.shape, k, ids.device)
    return _call("mobilemoe_look_up", ids.long().contiguous(), packed, (rows, k, group_size), out)


def _multiply(x: torch.Tensor, packed: torch.Tensor, rows: int, k: int, group_size: int) -> torch.Tensor:
    if x.shape[-1:] != (k,):
        raise ValueError(f"x is {list(x.shape)}: give [..., {k}]")
    out = _new(x.shape[:-1], rows, x.device)
    return _call("mobilemoe_multiply", x.float().contiguous(), packed, (rows, k, group_size), out)


def _call(
    name: str, values: torch.Tensor, packed: torch.Tensor, sizes: tuple[int, int, int], out: torch.Tensor
) -> torch.Tensor:
    """Let the library compute `out`, and return it. It gets bare pointers, so the packed matrix is checked here."""
    rows, k, group_size = sizes
    needed = blob_bytes(rows, k, group_size)
    if packed.dtype != torch.uint8 or packed.numel() != needed or not packed.is_contiguous():
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)}: give {needed} contiguous bytes, a matrix [{rows}, {k}] in "
            f"groups of {group_size}"
        )
    numbers = [ctypes.c_int64(number) for number in (out.numel() // out.shape[-1], *sizes)]
    getattr(expert_op.load(), name)(*numbers, *(ctypes.c_void_p(t.data_ptr()) for t in (values, packed, out)))
    return out
