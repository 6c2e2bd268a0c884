"""Embedding and output projection over one packed matrix: numbers, errors, and that a program holds it once."""

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn

from eval.device import expert_op
from eval.device.expert_op.matrix_ops import PackedEmbedding, PackedLinear, SharedMatrix
from eval.hf_mobilemoe.checkpoint_mobilemoe import dequantize_int4
from tests.eval.moe_reference import round_to_int8
from titan_ext.quantization.formulas import int4_scale, quantize_int4

ROWS, COLUMNS = 1003, 192  # the last tile of 8 rows is not full


@pytest.fixture(scope="module", autouse=True)
def library():
    return expert_op.load()


def make_matrix(group_size: int) -> tuple[SharedMatrix, torch.Tensor]:
    """Return a random matrix, and its numbers in float64."""
    weight_NK = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    scale = int4_scale(weight_NK, 1, group_size)
    q = quantize_int4(weight_NK, scale, 1, group_size)
    return SharedMatrix(q, scale), dequantize_int4(q, scale, 1, group_size).double()


@pytest.mark.parametrize("group_size", [32, 64, 192])
def test_rows_are_the_int4_numbers_bit_for_bit(group_size):
    matrix, expected_NK = make_matrix(group_size)
    ids = torch.arange(ROWS).flip(0)[None]
    assert torch.equal(PackedEmbedding(matrix)(ids)[0].double(), expected_NK.flip(0))


@pytest.mark.parametrize("group_size", [32, 64, 192])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 7), (2, 3)])
def test_products_round_activations_to_int8(group_size, shape):
    matrix, weight_NK = make_matrix(group_size)
    x = 3 * torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(1)) + 1
    expected = round_to_int8(x.reshape(-1, COLUMNS)) @ weight_NK.T
    found = PackedLinear(matrix)(x)
    assert found.shape == (*shape, ROWS)
    assert (found.reshape(-1, ROWS) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_does_not_fit_is_refused():
    matrix, _ = make_matrix(32)
    embedding, linear = PackedEmbedding(matrix), PackedLinear(matrix)
    for ids in ([[ROWS]], [[-1]]):
        with pytest.raises(ValueError, match=f"give 0 to {ROWS - 1}"):
            embedding(torch.tensor(ids))
    with pytest.raises(ValueError, match=r"give \[..., 192\]"):
        linear(torch.zeros(1, 191))
    linear.packed = linear.packed[:-1].clone()
    with pytest.raises(ValueError, match=r"a matrix \[1003, 192\] in groups of 32"):
        linear(torch.zeros(1, COLUMNS))


class Both(nn.Module):
    def __init__(self, matrix: SharedMatrix):
        super().__init__()
        self.embedding, self.linear = PackedEmbedding(matrix), PackedLinear(matrix)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embedding(ids))


def lower(model: nn.Module) -> bytes:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    program = torch.export.export(model, (ids,), dynamic_shapes=({1: torch.export.Dim("tokens", max=64)},))
    edge = to_edge_transform_and_lower(program, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    return edge.to_executorch().buffer


def test_a_program_holds_the_matrix_once_and_computes_the_same():
    matrix, _ = make_matrix(32)
    model = Both(matrix)
    buffer = lower(model)
    assert matrix.packed.numel() < len(buffer) < 1.1 * matrix.packed.numel()
    method = Runtime.get().load_program(buffer).load_method("forward")
    for ids in ([[5]], [[0, 1002, 7, 7, 8]]):
        assert torch.equal(method.execute([torch.tensor(ids)])[0], model(torch.tensor(ids)))


def test_the_runtime_refuses_what_does_not_fit():
    """A runner may pass any id, and a program of another exporter may hold anything."""
    matrix, _ = make_matrix(32)
    method = Runtime.get().load_program(lower(Both(matrix))).load_method("forward")
    for ids in ([[ROWS]], [[3, -1]]):
        with pytest.raises(RuntimeError, match="0x12"):
            method.execute([torch.tensor(ids)])
    for sizes in ((ROWS, COLUMNS, 31), (ROWS + 8, COLUMNS, 32), (ROWS, 2 * COLUMNS, 32)):
        matrix.sizes = sizes
        method = Runtime.get().load_program(lower(Both(matrix))).load_method("forward")
        with pytest.raises(RuntimeError, match="0x12"):
            method.execute([torch.tensor([[1]])])
