"""Large tensors in parts: the same numbers as at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.export import chunks
from eval.export.int4 import derive_scale, pack_int4
from eval.hf_mobilemoe.checkpoint_mobilemoe import unpack_int4


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 3), experts=st.integers(0, 3), limit=st.integers(1, 2000))
def test_parts_give_what_the_whole_gives(rows, groups, experts, limit):
    shape = (experts, rows, 32 * groups) if experts else (rows, 32 * groups)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rows))
    dim = len(shape) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "MAX_CHUNK_VALUES", limit)
        scale = chunks.map_chunks(lambda part: derive_scale(part, dim, 32), weight)
        assert torch.equal(scale, derive_scale(weight, dim, 32))
        q = torch.randint(-8, 8, shape, dtype=torch.int8)
        packed = chunks.map_chunks(lambda part: pack_int4(part, dim), q)
        assert torch.equal(packed, pack_int4(q, dim))
        assert torch.equal(chunks.map_chunks(lambda part: unpack_int4(part, dim), packed), q)
        transposed = weight.transpose(0, 1)
        assert torch.equal(chunks.map_chunks(lambda a, b: a + b, transposed, transposed), 2 * transposed)


def test_no_part_is_larger_than_the_limit_but_a_row(monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_VALUES", 100)
    sizes = []

    def see(part):
        sizes.append(part.numel())
        return part

    chunks.map_chunks(see, torch.zeros(10, 30))
    chunks.map_chunks(see, torch.zeros(2, 300))
    assert sizes == [90, 90, 90, 30, 300, 300]
