"""The packed expert weights: against the documented layout byte by byte, through ExecuTorch's op, against torchao."""

import struct

import pytest
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::quantized_moe_ffn)
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.device.expert_blobs import blob_bytes, pack_blobs
from tests.eval.moe_reference import RandomExperts
from titan_ext.quantization.formulas import int4_scale, quantize_int4


def pack_one(q: list[list[int]], scales: list[list[float]]) -> bytes:
    """One matrix by the documented layout, value by value."""
    n_rows, k, n_groups = len(q), len(q[0]), len(scales[0])
    group = k // n_groups
    out = struct.pack("<16i", 6712, 1, 4, 0, 0, 8, 16, 2, *[0] * 8)
    for tile in range(0, n_rows, 8):
        rows = [q[r] if r < n_rows else [0] * k for r in range(tile, tile + 8)]
        row_scales = [scales[r] if r < n_rows else [0.0] * n_groups for r in range(tile, tile + 8)]
        for g in range(n_groups):
            for start in range(g * group, (g + 1) * group, 16):
                values = [row[start + half * 8 + j] + 8 for half in (0, 1) for row in rows for j in range(8)]
                for run in range(0, 128, 32):
                    out += bytes(values[run + i] | values[run + i + 16] << 4 for i in range(16))
            out += struct.pack("<8f", *[s[g] for s in row_scales])
            out += struct.pack("<8i", *[sum(row[g * group : (g + 1) * group]) for row in rows])
    return out


@settings(max_examples=10)
@given(n_rows=st.integers(1, 20), n_groups=st.integers(1, 3), group=st.sampled_from([32, 64]), seed=st.integers(0, 99))
def test_bytes_are_the_documented_layout(n_rows, n_groups, group, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-8, 8, (2, n_rows, n_groups * group), dtype=torch.int8, generator=generator)
    scales = torch.rand(2, n_rows, n_groups, generator=generator).half()
    packed = pack_blobs(q, scales)
    for e in range(2):
        assert bytes(packed[e].tolist()) == pack_one(q[e].tolist(), scales[e].float().tolist())
    assert packed.shape == (2, blob_bytes(n_rows, n_groups * group, group))


@pytest.mark.parametrize("group_size", [32, 64])
def test_executorchs_op_reads_the_same_numbers(group_size):
    """Its x86 build multiplies float activations with the unpacked weights."""
    layer = RandomExperts(group_size=group_size)
    out = torch.ops.llama.quantized_moe_ffn(*layer.op_arguments())
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
    assert torch.equal(pack_blobs(q, scale)[0], theirs.view(torch.uint8))


def test_groups_the_op_cannot_read_are_refused():
    with pytest.raises(ValueError, match=r"48 inputs in 3 groups.*multiple of 32"):
        pack_blobs(torch.zeros(1, 8, 48, dtype=torch.int8), torch.ones(1, 8, 3))
