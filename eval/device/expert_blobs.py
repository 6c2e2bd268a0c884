"""This module packs INT4 matrices for the operators that multiply them with INT8 activations, ours and ExecuTorch's.

A matrix [rows, K] becomes 64 bytes of header and then tiles of 8 rows. The last tile is filled up with rows of zero.
The values of a tile lie in chunks of 16 along K. A chunk has 128 values: k 0-7 of rows 0 to 7, then k 8-15 of rows 0
to 7. Each value is stored plus 8. Every run of 32 values becomes 16 bytes: byte i is (value i) | (value i + 16) << 4.

- `pack_blobs` writes tiles for our operator, `mobilemoe::quantized_moe_ffn`: all values, then 8 float16 scales for
  every group along K, then 8 float32 sums of the rows' weights. With groups of 32 a weight takes 4.5 bits, and a row 4
  bytes more.
- `pack_stock_blobs` writes tiles for `llama::quantized_moe_ffn`, in torchao's "universal" layout: for every group along
  K its values, 8 float32 scales, and 8 int32 sums of the group's values. A weight takes 6 bits with groups of 32, 5
  with 64 and 4.5 with 128. torchao has a C++ op for this, which its x86 wheel lacks
  (torchao/csrc/cpu/torch_free_kernels/weight_packing, nr 8, kr 16, sr 2).

Shape suffixes: E experts, N rows (outputs), K columns (inputs), G groups of a row; T tiles, R rows of a tile.
"""

import torch

STOCK_HEADER = (6712, 1, 4, 0, 0, 8, 16, 2, 0, 0, 0, 0, 0, 0, 0, 0)
"""First 64 bytes of a matrix as little-endian int32: magic, universal layout, bits, has zero points, has bias, nr, kr,
sr and zeros."""
HEADER = (6712, 100, 4, 0, 0, 8, 16, 2, 0, 0, 0, 0, 0, 0, 0, 0)
"""The same of our layout, whose number torchao has not given to one of its own."""

TILE_ROWS, CHUNK = 8, 16
"""Numbers of rows in a tile and of values along K in a chunk: torchao's nr and kr."""


def pack_blobs(q_ENK: torch.Tensor, scale_ENG: torch.Tensor) -> torch.Tensor:
    """Return every expert's matrix in our layout.

    Args:
        q_ENK: int8 values in -8..7.
        scale_ENG: scales that float16 holds exactly, one for K / G values; K / G is a multiple of 32.

    Returns:
        uint8 [E, bytes of one expert].

    Raises:
        ValueError: K is not a multiple of the number of groups, the group size is not a multiple of 32, or a scale is
            not exact in float16.
    """
    if not torch.equal(scale_ENG.half().to(scale_ENG.dtype), scale_ENG):
        raise ValueError("expert scales are not exact in float16, in which the fast op stores them")
    q_ETRGK, scale_ETRG = _split_into_tiles(q_ENK, scale_ENG)
    sums_ETR = (q_ETRGK.sum(-1).double() * scale_ETRG.double()).sum(-1).float()
    scales = scale_ETRG.half().transpose(2, 3).contiguous()
    parts = [_pack_values(q_ETRGK), scales.view(torch.uint8), sums_ETR.view(torch.uint8)]
    return _put_together(HEADER, torch.cat([part.flatten(2) for part in parts], dim=2))


def pack_stock_blobs(q_ENK: torch.Tensor, scale_ENG: torch.Tensor) -> torch.Tensor:
    """Return every expert's matrix in torchao's layout.

    Arguments, result and errors are those of `pack_blobs`, but a scale may be any float32.
    """
    q_ETRGK, scale_ETRG = _split_into_tiles(q_ENK, scale_ENG)
    scales, sums = scale_ETRG.float(), q_ETRGK.sum(-1, dtype=torch.int32)
    tail = [t.transpose(2, 3).contiguous().view(torch.uint8) for t in (scales, sums)]
    return _put_together(STOCK_HEADER, torch.cat([_pack_values(q_ETRGK), *tail], dim=3))


def blob_bytes(n_rows: int, k: int, group_size: int) -> int:
    """Return the size in bytes of one matrix [n_rows, k] in our layout, header included."""
    tile = TILE_ROWS * (k // 2 + 2 * (k // group_size) + 4)
    return 4 * len(HEADER) + -(-n_rows // TILE_ROWS) * tile


def stock_blob_bytes(n_rows: int, k: int, group_size: int) -> int:
    """Return the size in bytes of one matrix [n_rows, k] in torchao's layout, header included."""
    tile = TILE_ROWS * (k // 2 + 8 * (k // group_size))
    return 4 * len(STOCK_HEADER) + -(-n_rows // TILE_ROWS) * tile


def _split_into_tiles(q_ENK: torch.Tensor, scale_ENG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [E, T, R, G, K / G] and scales [E, T, R, G] of whole tiles."""
    n_experts, n_rows, k = q_ENK.shape
    n_groups = scale_ENG.shape[2]
    group_size = k // n_groups
    if k != n_groups * group_size or group_size % 32:
        raise ValueError(
            f"expert weights of {k} inputs in {n_groups} groups: the fused op takes groups of a multiple of 32 values"
        )
    filling = (0, 0, 0, -n_rows % TILE_ROWS)
    q_ENK = torch.nn.functional.pad(q_ENK, filling)
    scale_ENG = torch.nn.functional.pad(scale_ENG, filling)
    return (
        q_ENK.reshape(n_experts, -1, TILE_ROWS, n_groups, group_size),
        scale_ENG.reshape(n_experts, -1, TILE_ROWS, n_groups),
    )


def _pack_values(q_ETRGK: torch.Tensor) -> torch.Tensor:
    """Return the bytes of every group's values, uint8 [E, T, G, bytes]."""
    # [E, T, R, G, chunk, half, 8] -> [E, T, G, chunk, half, R, 8]: 128 values a chunk, 4 runs of 32
    values = q_ETRGK.unflatten(4, (-1, 2, 8)).permute(0, 1, 3, 4, 5, 2, 6)
    low, high = (values + 8).to(torch.uint8).reshape(*values.shape[:3], -1, 2, 16).unbind(-2)
    return (low | (high << 4)).flatten(3)


def _put_together(header: tuple[int, ...], tiles: torch.Tensor) -> torch.Tensor:
    start = torch.tensor(header, dtype=torch.int32).view(torch.uint8).expand(len(tiles), -1)
    return torch.cat([start, tiles.flatten(1)], dim=1)
