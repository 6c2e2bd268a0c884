"""The packed expert weights: against the documented layout byte by byte, through ExecuTorch's op, against torchao."""

import operator
import struct

import pytest
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::quantized_moe_ffn)
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.device.expert_blobs import blob_bytes, pack_blobs, pack_stock_blobs, stock_blob_bytes
from tests.eval.moe_reference import RandomExperts
from titan_ext.quantization.formulas import int4_scale, quantize_int4


def pack_one(q: list[list[int]], scales: list[list[float]], *, stock: bool) -> bytes:
    """Pack one matrix by the documented layout, value by value."""
    n_rows, k, n_groups = len(q), len(q[0]), len(scales[0])
    group = k // n_groups
    out = struct.pack("<16i", 6712, 1 if stock else 100, 4, 0, 0, 8, 16, 2, *[0] * 8)
    for tile in range(0, n_rows, 8):
        rows = [q[r] if r < n_rows else [0] * k for r in range(tile, tile + 8)]
        row_scales = [scales[r] if r < n_rows else [0.0] * n_groups for r in range(tile, tile + 8)]
        group_sums = [[sum(row[g * group : (g + 1) * group]) for g in range(n_groups)] for row in rows]
        tails = b""
        for g in range(n_groups):
            for start in range(g * group, (g + 1) * group, 16):
                values = [row[start + half * 8 + j] + 8 for half in (0, 1) for row in rows for j in range(8)]
                for run in range(0, 128, 32):
                    out += bytes(values[run + i] | values[run + i + 16] << 4 for i in range(16))
            if stock:
                out += struct.pack("<8f8i", *[s[g] for s in row_scales], *[sums[g] for sums in group_sums])
            else:
                tails += struct.pack("<8e", *[s[g] for s in row_scales])
        if not stock:
            sums = [sum(map(operator.mul, *row)) for row in zip(row_scales, group_sums, strict=True)]
            out += tails + struct.pack("<8f", *sums)
    return out


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
@settings(max_examples=10)
@given(n_rows=st.integers(1, 20), n_groups=st.integers(1, 3), group=st.sampled_from([32, 64]), seed=st.integers(0, 99))
def test_bytes_are_the_documented_layout(stock, n_rows, n_groups, group, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (2, n_rows, n_groups * group), dtype=torch.int8, generator=generator)
    scales = torch.rand(2, n_rows, n_groups, generator=generator).half()
    packed = pack_stock_blobs(q, scales) if stock else pack_blobs(q, scales)
    for e in range(2):
        assert bytes(packed[e].tolist()) == pack_one(q[e].tolist(), scales[e].float().tolist(), stock=stock)
    size = stock_blob_bytes if stock else blob_bytes
    assert packed.shape == (2, size(n_rows, n_groups * group, group))


def test_a_weight_takes_four_and_a_half_bits():
    assert 8 * blob_bytes(1024, 1024, 32) / 1024**2 == pytest.approx(4.5, rel=0.01)
    assert 8 * stock_blob_bytes(1024, 1024, 32) / 1024**2 == pytest.approx(6.0, rel=0.01)


@pytest.mark.parametrize("group_size", [32, 64])
def test_executorchs_op_reads_the_same_numbers(group_size):
    """Its x86 build multiplies float activations with the unpacked weights."""
    layer = RandomExperts(group_size=group_size)
    out = torch.ops.llama.quantized_moe_ffn(*layer.op_arguments(stock=True))
    expected = layer.reference(int8_activations=False)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_torchaos_packer_gives_the_same_bytes():
    pack = getattr(torch.ops.torchao, "_pack_8bit_act_4bit_weight", None)
    if pack is None:
        pytest.skip("torchao's packing op is in its aarch64 builds only")
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    scale = int4_scale(weight[None], 2, 32)
    q = quantize_int4(weight[None], scale, 2, 32)
    theirs = pack(q[0], scale[0].float().flatten(), None, 32, None, "universal")
    assert torch.equal(pack_stock_blobs(q, scale)[0], theirs.view(torch.uint8))


@pytest.mark.parametrize("pack", [pack_blobs, pack_stock_blobs])
def test_groups_the_op_cannot_read_are_refused(pack):
    with pytest.raises(ValueError, match=r"48 inputs in 3 groups.*multiple of 32"):
        pack(torch.zeros(1, 8, 48, dtype=torch.int8), torch.ones(1, 8, 3))


@pytest.mark.parametrize("scale", [1 / 3, 1e6])
def test_scales_that_float16_would_round_are_refused(scale):
    with pytest.raises(ValueError, match="not exact in float16"):
        pack_blobs(torch.zeros(1, 8, 32, dtype=torch.int8), torch.full((1, 8, 1), scale))
