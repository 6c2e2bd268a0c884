"""This module packs expert weights for `llama::quantized_moe_ffn`: torchao's "universal" layout, on x86 and ARM.

torchao has a C++ op for this, which its x86 wheel lacks (torchao/csrc/cpu/torch_free_kernels/weight_packing, nr 8,
kr 16, sr 2). A matrix [rows, K] becomes 64 bytes of header and then tiles of 8 rows. The last tile is filled up with
rows of zero. A tile holds, for every group along K: the values in chunks of 16 along K, 8 float32 scales, 8 int32 sums
of the values. A chunk has 128 values: k 0-7 of rows 0 to 7, then k 8-15 of rows 0 to 7. Each value is stored plus 8.
Every run of 32 values becomes 16 bytes: byte i is (value i) | (value i + 16) << 4. A weight takes 6 bits with groups
of 32, 5 with 64 and 4.5 with 128.

Shape suffixes: E experts, N rows (outputs), K columns (inputs), G groups of a row.
"""

import torch

HEADER = (6712, 1, 4, 0, 0, 8, 16, 2, 0, 0, 0, 0, 0, 0, 0, 0)
"""First 64 bytes of a matrix as little-endian int32: magic, universal layout, bits, has zero points, has bias, nr, kr,
sr and zeros."""

TILE_ROWS, CHUNK = 8, 16
"""Numbers of rows in a tile and of values along K in a chunk: torchao's nr and kr."""


def pack_blobs(q_ENK: torch.Tensor, scale_ENG: torch.Tensor) -> torch.Tensor:
    """Return every expert's matrix in the layout of this module.

    Args:
        q_ENK: int8 values in -8..7.
        scale_ENG: float scales, one for K / G values; K / G is a multiple of 32.

    Returns:
        uint8 [E, bytes of one expert].

    Raises:
        ValueError: K is not a multiple of the number of groups, or the group size is not a multiple of 32.
    """
    n_experts, n_rows, k = q_ENK.shape
    n_groups = scale_ENG.shape[2]
    group_size = k // n_groups
    if k != n_groups * group_size or group_size % 32:
        raise ValueError(
            f"expert weights of {k} inputs in {n_groups} groups: the fused op takes groups of a multiple of 32 values"
        )
    filling = -n_rows % TILE_ROWS
    q_ENK = torch.nn.functional.pad(q_ENK, (0, 0, 0, filling)).contiguous()
    scale_ENG = torch.nn.functional.pad(scale_ENG.float(), (0, 0, 0, filling)).contiguous()
    tiles = (n_rows + filling) // TILE_ROWS
    # [E, tile, row, group, chunk, half, 8] -> [E, tile, group, chunk, half, row, 8]: 128 values a chunk, 4 runs of 32
    values = q_ENK.view(n_experts, tiles, TILE_ROWS, n_groups, group_size // CHUNK, 2, 8).permute(0, 1, 3, 4, 5, 2, 6)
    low, high = (values + 8).to(torch.uint8).reshape(n_experts, tiles, n_groups, -1, 2, 16).unbind(-2)
    data = (low | (high << 4)).flatten(3)
    sums = q_ENK.view(n_experts, tiles, TILE_ROWS, n_groups, group_size).sum(-1, dtype=torch.int32)
    scales = scale_ENG.view(n_experts, tiles, TILE_ROWS, n_groups)
    tail = [t.transpose(2, 3).contiguous().view(torch.uint8) for t in (scales, sums)]
    body = torch.cat([data, *tail], dim=3).flatten(1)
    header = torch.tensor(HEADER, dtype=torch.int32).view(torch.uint8).expand(n_experts, -1)
    return torch.cat([header, body], dim=1)


def blob_bytes(n_rows: int, k: int, group_size: int) -> int:
    """Return the size in bytes of one packed matrix [n_rows, k], header included."""
    tiles = -(-n_rows // TILE_ROWS)
    return 4 * len(HEADER) + tiles * (k // group_size) * (TILE_ROWS * group_size // 2 + 2 * 4 * TILE_ROWS)
