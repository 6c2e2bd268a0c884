"""The closed formula for a step's memory against what autograd really keeps, and against arithmetic by hand."""

import dataclasses
import math
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from titan_ext.cards import Card, Machine
from titan_ext.config import FLAVORS, ModelDims, ParallelConfig
from titan_ext.layout import AMPLE, RECOMPUTATION, settle_layout
from titan_ext.memory import activation_bytes_per_token, estimate_memory, selective_bytes_per_token
from titan_ext.mobilemoe import model_config
from titan_ext.mobilemoe.recomputation import KeepProducts
from titan_ext.mobilemoe.row_gather import sum_rows
from titan_ext.model_stats import count_parameters, split_layers
from titan_ext.training.schedules import published_stages

B, L = 2, 1024


def bytes_kept(
    dims: ModelDims, n_layers: int, dtype: torch.dtype, capacity_factor: float | None,
    checkpoint: str = "none", compiled: bool = False,
) -> int:  # fmt: skip
    """Memory that a forward pass leaves allocated: what its backward pass needs, and the logits."""
    dims = dataclasses.replace(dims, n_layers=n_layers, vocab_size=256)
    model = model_config(dims, capacity_factor=capacity_factor).build()
    model.init_states()
    model.to(dtype)
    for block in model.layers.values():
        block.moe.expert_bias_E = block.moe.expert_bias_E.float()
    if checkpoint != "none":
        {"selective": KeepProducts, "full": FullAC}[checkpoint].Config().build().apply(model)
    for block in model.layers.values() if compiled else ():
        block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    tokens, positions = torch.randint(0, dims.vocab_size, (B, L)), torch.arange(L).repeat(B, 1)
    if compiled:
        model(tokens, positions=positions)  # compiling allocates memory of its own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        logits = model(tokens, positions=positions)
    assert logits.requires_grad
    return sum(event.nbytes() for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")


def bytes_of_a_layer(*arguments, **options) -> float:
    """Bytes a token that a second layer adds."""
    dims, *rest = arguments
    two, one = (bytes_kept(dims, n, *rest, **options) for n in (2, 1))
    return (two - one) / (B * L)


@pytest.mark.parametrize("capacity_factor", [None, 1.5])
@pytest.mark.parametrize(("flavor", "dtype"), [("S", "bfloat16"), ("tiny", "bfloat16"), ("tiny", "float32")])
def test_a_layer_keeps_what_the_formula_says(flavor, dtype, capacity_factor):
    dims, torch_dtype = FLAVORS[flavor], getattr(torch, dtype)
    layer = bytes_of_a_layer(dims, torch_dtype, capacity_factor)
    expected = activation_bytes_per_token(dims, torch_dtype.itemsize, capacity_factor)
    assert layer == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("changes", [{}, {"d_model": 256}])
@pytest.mark.parametrize("capacity_factor", [None, 1.5])
def test_selective_recomputation_keeps_what_the_formula_says(capacity_factor, changes):
    dims = dataclasses.replace(FLAVORS["tiny"], **changes)
    layer = bytes_of_a_layer(dims, torch.bfloat16, capacity_factor, checkpoint="selective")
    # torchtitan knows flex attention, which it keeps on a GPU, and not the kernel that the CPU has instead.
    attention = dims.n_heads * (2 * dims.head_dim + 4)
    expected = selective_bytes_per_token(dims, 2, capacity_factor, exchanged=False)
    assert layer + attention == pytest.approx(expected, rel=0.05)


def test_full_recomputation_keeps_the_input_of_a_layer():
    dims = FLAVORS["tiny"]
    assert bytes_of_a_layer(dims, torch.bfloat16, 1.5, checkpoint="full") == pytest.approx(2 * dims.d_model, rel=0.05)


@pytest.mark.parametrize("capacity_factor", [None, 1.5])
def test_a_compiled_layer_keeps_what_the_formula_says(capacity_factor):
    dims = FLAVORS["tiny"]
    layer = bytes_of_a_layer(dims, torch.bfloat16, capacity_factor, compiled=True)
    assert layer == pytest.approx(activation_bytes_per_token(dims, 2, capacity_factor, compiled=True), rel=0.05)
    assert activation_bytes_per_token(dims, 2, capacity_factor) > 1.3 * layer


def test_recomputation_adds_one_layer_to_what_is_kept_of_all():
    dims, stage = FLAVORS["L"], published_stages()["pretrain"]
    layout = ParallelConfig(world_size=256, expert_parallel=4)
    plain, selective, full = (
        estimate_memory(dims, stage, dataclasses.replace(layout, activation_checkpoint=name))
        for name in ("none", "selective", "full")
    )
    assert plain.recomputed == 0 and selective.recomputed == full.recomputed == plain.activations // dims.n_layers
    assert full.activations == 2 * dims.d_model * stage.local_batch_size * stage.seq_len * dims.n_layers
    assert full.peak < selective.peak < 0.6 * plain.peak
    own = estimate_memory(
        dims, stage, dataclasses.replace(layout, expert_parallel=1, activation_checkpoint="selective")
    )
    rows = 1.5 * dims.top_k * stage.local_batch_size * stage.seq_len
    exchanged = 2 * 2 * rows * dims.d_model * dims.n_layers
    assert selective.activations - own.activations == pytest.approx(exchanged, rel=1e-3), "kept rows of the exchange"


def test_a_gpu_compiles_and_computes_as_little_again_as_its_memory_allows():
    dims, stages = FLAVORS["S"], list(published_stages().values())
    layout = ParallelConfig(world_size=64, data_parallel_replicate=8)
    peaks = {}
    for name in RECOMPUTATION:
        compiled = dataclasses.replace(layout, activation_checkpoint=name, compile=True)
        peaks[name] = max(estimate_memory(dims, stage, compiled).peak for stage in stages)
    assert peaks["none"] > peaks["selective"] > peaks["full"]
    for name, peak in peaks.items():
        exact = math.ceil(peak / (1 - AMPLE))
        at_limit, below = (Machine(dataclasses.replace(Card(), memory=size)) for size in (exact, exact - 2))
        assert settle_layout(dims, stages, layout, at_limit).activation_checkpoint == name
        assert settle_layout(dims, stages, layout, below).activation_checkpoint != name or name == "full"
    settled = settle_layout(dims, stages, layout, None)
    assert (settled.activation_checkpoint, settled.compile) == ("none", False)
    stated = dataclasses.replace(layout, activation_checkpoint="full", compile=False)
    for machine in (None, Machine()):
        assert settle_layout(dims, stages, stated, machine) == stated


def test_recomputed_experts_keep_their_products():
    """Counted by the profiler, which counts an operation twice where a policy of recomputation looks at it."""

    def count_products(checkpoint: type | None) -> int:
        model = model_config(dataclasses.replace(FLAVORS["tiny"], n_layers=1)).build()
        model.init_states()
        if checkpoint is not None:
            checkpoint.Config().build().apply(model)
        tokens = torch.randint(0, 100, (1, 64))
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(tokens, positions=torch.arange(64)[None]).sum().backward()
        return sum(event.count for event in profiled.key_averages() if event.key == "aten::_grouped_mm")

    assert count_products(None) == 9, "three forward, six backward"
    assert count_products(FullAC) == 9 + 3
    assert count_products(SelectiveAC) == 9 + 3 + 2 * 3
    assert count_products(KeepProducts) == 9 + 3 + 3, "looked at again, and not computed again"


def test_the_weighted_sum_of_experts_holds_three_float32_copies_in_its_backward_pass():
    """Read from the profiler, in eager mode; compiled, the gradient alone is counted."""
    T, K, D = 512, 4, 256
    row_TK = torch.randperm(T * K).view(T, K)
    token_R = torch.empty(T * K, dtype=torch.int64).scatter(0, row_TK.flatten(), torch.arange(T * K) // K)
    rows_RD = torch.randn(T * K, D).bfloat16().requires_grad_()
    out_TD = sum_rows(rows_RD, torch.rand(T, K), row_TK, token_R, torch.rand(T * K))
    grad_TD = torch.randn_like(out_TD)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out_TD.backward(grad_TD)
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    dims, stage = dataclasses.replace(FLAVORS["tiny"], d_model=D, top_k=K), published_stages()["sft"]
    stage = dataclasses.replace(stage, local_batch_size=1, seq_len=T)
    eager, compiled = (
        estimate_memory(dims, stage, ParallelConfig(world_size=1, compile=compile)).combination
        for compile in (False, True)
    )
    assert peak == pytest.approx(eager, rel=0.05) and eager == 6 * compiled == 12 * T * K * D


def test_static_parts_are_what_fsdp_shards():
    dims, stage = FLAVORS["S"], published_stages()["pretrain"]
    total = count_parameters(dims).total
    whole, shared = (estimate_memory(dims, stage, ParallelConfig(world_size=n, expert_parallel=n)) for n in (1, 4))
    assert (whole.parameters, whole.gradients, whole.optimizer) == (4 * total, 4 * total, 8 * total)
    assert shared.parameters == pytest.approx(total, abs=1)
    assert shared.gathered < whole.gathered and shared.activations == whole.activations
    replicas = estimate_memory(dims, stage, ParallelConfig(world_size=4, data_parallel_replicate=2))
    assert replicas.parameters == pytest.approx(2 * total, abs=1), "a replica of two ranks"


def test_qat_holds_the_rounded_weights_of_the_shard():
    dims, parallel = FLAVORS["S"], ParallelConfig(world_size=4)
    sft, qat = (estimate_memory(dims, published_stages()[name], parallel) for name in ("sft", "qat"))
    assert qat.peak - sft.peak == qat.rounded == sft.parameters // 2, "bfloat16 beside float32"


def test_self_distillation_holds_the_teachers_weights():
    dims, stage, parallel = FLAVORS["S"], published_stages()["qat"], ParallelConfig(world_size=4)
    taught = dataclasses.replace(stage, quantize=True, distillation_weight=0.5)
    plain, distilled = (estimate_memory(dims, each, parallel) for each in (stage, taught))
    assert distilled.peak - plain.peak == plain.parameters // 2, "in bfloat16"


def test_accumulating_ranks_hold_gradients_and_activations_at_once():
    dims, stage = FLAVORS["S"], published_stages()["pretrain"]
    few = estimate_memory(dims, stage, ParallelConfig(world_size=4))
    many = estimate_memory(dims, stage, ParallelConfig(world_size=256))
    assert few.accumulates and not many.accumulates
    assert few.peak == few.parameters + few.optimizer + few.gathered + few.gradients + few.reduction + (
        few.activations + max(few.head + few.logits, few.head_gradient + few.combination)
    )
    assert few.head == many.head == 2 * few.head_gradient == 4 * dims.vocab_size * dims.d_model
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
