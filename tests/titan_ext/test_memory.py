"""The closed formula for a step's memory against what autograd really keeps, and against arithmetic by hand."""

import dataclasses

import pytest
import torch

from titan_ext.config import FLAVORS, ModelDims, ParallelConfig
from titan_ext.memory import activation_bytes_per_token, estimate_memory
from titan_ext.mobilemoe import model_config
from titan_ext.model_stats import count_parameters, split_layers
from titan_ext.training.schedules import published_stages

B, L = 2, 1024


def bytes_kept(dims: ModelDims, n_layers: int, dtype: torch.dtype, capacity_factor: float | None) -> int:
    """Storage that autograd holds after a forward pass, weights left out."""
    dims = dataclasses.replace(dims, n_layers=n_layers, vocab_size=256)
    model = model_config(dims, capacity_factor=capacity_factor).build()
    model.init_states()
    model.to(dtype)
    for block in model.layers.values():
        block.moe.expert_bias_E = block.moe.expert_bias_E.float()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, dims.vocab_size, (B, L))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens, positions=torch.arange(L).repeat(B, 1))
    assert logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("capacity_factor", [None, 1.5])
@pytest.mark.parametrize(("flavor", "dtype"), [("S", "bfloat16"), ("tiny", "bfloat16"), ("tiny", "float32")])
def test_a_layer_keeps_what_the_formula_says(flavor, dtype, capacity_factor):
    dims, torch_dtype = FLAVORS[flavor], getattr(torch, dtype)
    layer = bytes_kept(dims, 2, torch_dtype, capacity_factor) - bytes_kept(dims, 1, torch_dtype, capacity_factor)
    expected = activation_bytes_per_token(dims, torch_dtype.itemsize, capacity_factor)
    assert layer / (B * L) == pytest.approx(expected, rel=0.15)


def test_static_parts_are_what_fsdp_shards():
    dims, stage = FLAVORS["S"], published_stages()["pretrain"]
    total = count_parameters(dims).total
    whole, shared = (estimate_memory(dims, stage, ParallelConfig(world_size=n, expert_parallel=n)) for n in (1, 4))
    assert (whole.parameters, whole.gradients, whole.optimizer) == (4 * total, 4 * total, 8 * total)
    assert shared.parameters == pytest.approx(total, abs=1)
    assert shared.gathered < whole.gathered and shared.activations == whole.activations
    replicas = estimate_memory(dims, stage, ParallelConfig(world_size=4, data_parallel_replicate=2))
    assert replicas.parameters == pytest.approx(2 * total, abs=1), "a replica of two ranks"


def test_self_distillation_holds_the_teachers_weights():
    dims, stage, parallel = FLAVORS["S"], published_stages()["qat"], ParallelConfig(world_size=4)
    taught = dataclasses.replace(stage, quantize=True, distillation_weight=0.5)
    plain, distilled = (estimate_memory(dims, each, parallel) for each in (stage, taught))
    assert distilled.peak - plain.peak == plain.parameters


def test_accumulating_ranks_hold_gradients_and_activations_at_once():
    dims, stage = FLAVORS["S"], published_stages()["pretrain"]
    few = estimate_memory(dims, stage, ParallelConfig(world_size=4))
    many = estimate_memory(dims, stage, ParallelConfig(world_size=256))
    assert few.accumulates and not many.accumulates
    assert few.peak == few.parameters + few.optimizer + few.gathered + few.gradients + few.reduction + (
        few.activations + few.head + max(few.logits, few.combination)
    )
    assert few.head == many.head == 4 * dims.vocab_size * dims.d_model
    assert many.peak < few.peak


def test_a_pipelines_first_rank_holds_its_layers_and_all_micro_batches_under_way():
    dims, stage = dataclasses.replace(FLAVORS["L"], vocab_size=2048), published_stages()["pretrain"]
    whole = estimate_memory(dims, stage, ParallelConfig(world_size=1))
    parts = estimate_memory(dims, stage, ParallelConfig(world_size=4, pipeline_parallel=4))
    count = count_parameters(dims)
    assert split_layers(dims, 4) == [8] * 4
    assert parts.parameters == pytest.approx(4 * (count.embedding + (count.total - count.embedding) / 4), rel=1e-3)
    assert parts.activations == whole.activations, "a quarter of the layers, four micro-batches"
    assert parts.logits == 0, "they are the last rank's"
    twice = ParallelConfig(world_size=4, pipeline_parallel=4, pipeline_schedule="Interleaved1F1B")
    assert estimate_memory(dims, stage, twice).activations == whole.activations * 11 // 8
    few = dataclasses.replace(stage, global_batch_size=stage.local_batch_size)
    assert estimate_memory(dims, few, twice).activations == whole.activations // 4


def test_the_replica_of_the_tied_matrix_has_no_optimizer_state():
    dims, stage = dataclasses.replace(FLAVORS["tiny"], vocab_size=128_256), published_stages()["pretrain"]
    parts = estimate_memory(dims, stage, ParallelConfig(world_size=2, pipeline_parallel=2))
    assert parts.logits > 0, "with so few layers the last rank needs the most"
    assert parts.optimizer == 2 * (parts.parameters - 4 * count_parameters(dims).embedding)
