"""Private interfaces of torch, torchtitan and streaming that titan_ext uses. No other file of titan_ext imports them.

Each has a test in tests/titan_ext/test_model_contracts.py or test_loader_contracts.py that names what breaks when a
new version changes it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed import Backend
from torch.distributed._functional_collectives import (
    AsyncCollectiveTensor,
    all_gather_tensor,
    all_gather_tensor_autograd,
)
from torch.distributed.checkpoint.filesystem import FileSystem as CheckpointFileSystem

# Not FileSystemWriter: `async_save` would take it for the stager too, and copy the state in another way.
from torch.distributed.checkpoint.filesystem import _FileSystemWriter as CheckpointWriter
from torch.distributed.distributed_c10d import ProcessGroupGloo
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam as ShardedParameter
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from streaming.base.format.mds import MDSReader
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

__all__ = [
    "CheckpointFileSystem",
    "CheckpointWriter",
    "ReduceScatter",
    "ShardedParameter",
    "all_gather_tensor",
    "all_gather_tensor_autograd",
    "clip_by",
    "describe_float8_rows",
    "divide_exactly",
    "download_file",
    "end_without_sleep",
    "exchange_counts",
    "gather_instead",
    "get_owners",
    "get_param_groups",
    "is_being_gathered",
    "make_shard_reader",
    "move_param_groups",
    "multiply_grouped",
    "multiply_grouped_in_float8",
    "reduces_on_one_rank",
    "return_hidden_states",
    "return_rows_to_tokens",
    "round_groups_to_float8",
    "round_to_float8",
    "run_gloo_in_one_thread",
    "send_rows_to_experts",
    "set_found_inf",
    "set_reduce_scatter",
    "start_groups",
]


def divide_exactly() -> None:
    """Let compiled code for GPUs divide one tensor by another as uncompiled code does; by default it approximates."""
    from torch._inductor import config as inductor_config

    inductor_config.eager_numerics.division_rounding = True


def run_gloo_in_one_thread() -> None:
    """Give every gloo group that is created from now on one worker thread; by default it has two.

    A worker that has finished a collective notes the collective's name in the group's status, and takes no lock
    (`ProcessGroupGloo::runLoop`, torch 2.14.1). FSDP's all-gathers have a name so long that it is stored on the heap.
    When both workers note one at the same time, both free the one before, and the rank dies later of a damaged heap: on
    a busy machine, two of some hundred runs of a few steps did. The ranks call the collectives of a group in the same
    order, so one worker is enough.
    """
    Backend._plugins[Backend.GLOO.upper()] = Backend._BackendPlugin(_create_gloo_group, extended_api=True)


def _create_gloo_group(group: Any, backend_options: object | None) -> ProcessGroupGloo:
    """Create the group as torch does, but with one worker thread. GLOO_SOCKET_IFNAME names its interfaces."""
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs of torch lack it
    options._devices = [ProcessGroupGloo.create_device(interface=name) for name in names] or [
        ProcessGroupGloo.create_default_device()
    ]
    options._threads = 1
    options._timeout = group.timeout
    options.enable_reconfigure = group.enable_reconfigure
    options.global_ranks_in_group = group.global_ranks_in_group
    options.group_name = group.group_id
    return ProcessGroupGloo(group.store, group.group_rank, group.group_size, options)


def get_param_groups(module: FSDPModule) -> list[FSDPParamGroup]:
    """Return FSDP2's parameter groups of one unit. `fully_shard` makes one for every mesh and does not expose them."""
    return module._get_fsdp_state()._fsdp_param_groups


def reduces_on_one_rank(group: FSDPParamGroup) -> bool:
    """Return whether no other rank takes part in the reduction of the group's gradients: one shard and no replicas."""
    return not isinstance(group.mesh_info, DDPMeshInfo) and group._reduce_scatter_process_group.size() == 1


def set_reduce_scatter(group: FSDPParamGroup, reduce_scatter: ReduceScatter) -> None:
    """Replace a group's reduce-scatter, and switch off the division of the gradients before it.

    FSDPModule.set_custom_reduce_scatter refuses a unit that has several groups.
    """
    group._reduce_scatter_comm = reduce_scatter
    group.gradient_divide_factor = None


def move_param_groups(source: FSDPModule, target: FSDPModule) -> None:
    """Make `target`'s hooks gather the parameters of `source` and reduce their gradients, and remove `source`'s hooks.

    `fully_shard` offers no way to give a part of a unit another mixed-precision policy.
    """
    source_state, target_state = source._get_fsdp_state(), target._get_fsdp_state()
    for group in source_state._fsdp_param_groups:
        group.modules = target_state._modules  # FSDP2 prefetches groups of the same modules together
    target_state._fsdp_param_groups.extend(source_state._fsdp_param_groups)
    source_state._fsdp_param_groups.clear()
    source_state._pre_forward_hook_handle.remove()
    source_state._post_forward_hook_handle.remove()


def start_groups(groups: Iterable[FSDPParamGroup]) -> None:
    """Do what FSDP2 puts off until the first forward pass: it finds the shards' memory and dtypes then."""
    for group in groups:
        group.lazy_init()


def get_owners(parameter: ShardedParameter) -> list[tuple[torch.nn.Module, str]]:
    """Return the modules that a parameter belongs to, each with the parameter's name in it; a tied one has several."""
    info = parameter._module_info
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


def gather_instead(parameter: ShardedParameter, shard: torch.Tensor) -> None:
    """Let FSDP2 gather `shard`, of the shard's shape and the computing dtype, in place of the parameter's own values.

    The gradient, the optimizer and the checkpoints stay those of the parameter. FSDP2's own way to do so, a tensor
    class with `fsdp_pre_all_gather`, would make the master weights tensors of that class for all of those. It holds
    until the parameter is loaded anew.
    """
    if shard.shape != parameter.padded_sharded_param_size:  # ranks that have less than their share gather zeros too
        padded = shard.new_zeros(parameter.padded_sharded_param_size)
        padded.narrow(parameter.fsdp_placement.dim, 0, shard.shape[parameter.fsdp_placement.dim]).copy_(shard)
        shard = padded
    parameter._sharded_param_data = shard.view(-1)


def is_being_gathered(value: object) -> bool:
    """Return whether `value` is a DTensor whose local tensor is the result of a collective that still runs."""
    return isinstance(value, DTensor) and isinstance(value._local_tensor, AsyncCollectiveTensor)


def return_hidden_states(model: Any) -> None:
    """Make torchtitan's Decoder return what its output projection takes, [B, L, D], instead of logits."""
    model._skip_lm_head = True


@contextmanager
def clip_by(function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let torchtitan's Trainer call `function` in place of its `clip_grad_norm_`, between backward pass and update.

    The trainer offers no hook there, and its own call comes without a way to use the norm that it computes.
    """
    from torchtitan.distributed import utils as dist_utils  # here, because readers of shards do not need torchtitan

    original = dist_utils.clip_grad_norm_
    dist_utils.clip_grad_norm_ = function
    try:
        yield
    finally:
        dist_utils.clip_grad_norm_ = original


@contextmanager
def end_without_sleep() -> Iterator[None]:
    """Let torchtitan's `Trainer.train`, called in the block, return at its end.

    By itself, rank 0 sleeps two seconds there, so that the others end before the store that it hosts. The caller makes
    the ranks wait for each other instead.
    """
    import torchtitan.trainer

    torchtitan.trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
    try:
        yield
    finally:
        torchtitan.trainer.time = time


def set_found_inf(optimizer: torch.optim.Optimizer, found: torch.Tensor | None) -> None:
    """Make the next steps of a fused optimizer change nothing if `found`, float32 [] on its device, is 1.

    torch.amp.GradScaler sets the same attribute.
    """
    optimizer.found_inf = found  # type: ignore[attr-defined]  # torch's optimizers read it by name


def exchange_counts(
    dispatcher: "AllToAllTokenDispatcher", counts_E: torch.Tensor, group: dist.ProcessGroup, num_ranks: int
) -> tuple[torch.Tensor, list[int], list[int]]:
    """Tell every rank of the expert-parallel group how many rows its experts get from this rank, and wait for it.

    Args:
        counts_E: int64, number of this rank's rows for each expert.

    Returns:
        The rows that come from each rank for each expert of this rank, int64 [ranks * e]; the number of rows to send to
        each rank, and of those that come from it.
    """
    arriving = dispatcher._token_count_exchange(counts_E, group, num_ranks)
    return dispatcher._sync_token_count_exchange(counts_E, arriving, num_ranks)


def send_rows_to_experts(
    dispatcher: "AllToAllTokenDispatcher",
    rows_RD: torch.Tensor,
    group: dist.ProcessGroup,
    sent: list[int],
    arriving: list[int],
) -> torch.Tensor:
    """Exchange rows over the expert-parallel group: `sent[i]` rows go to rank i, and `arriving[i]` come from it.

    torchtitan's dispatcher offers its exchange only together with a reordering whose gradient is a scatter-add.
    """
    return dispatcher._dispatch_token_exchange(rows_RD, group, arriving, sent)


def return_rows_to_tokens(
    dispatcher: "AllToAllTokenDispatcher",
    rows_RD: torch.Tensor,
    group: dist.ProcessGroup,
    sent: list[int],
    arriving: list[int],
) -> torch.Tensor:
    """Exchange the experts' outputs back: the reverse of `send_rows_to_experts` with the same arguments."""
    return dispatcher._combine_token_exchange(rows_RD, group, sent, arriving)


def multiply_grouped(
    experts: "GroupedExperts", a_RK: torch.Tensor, b_EKN: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """Multiply each expert's rows of `a_RK` with its own matrix, and return [R, N].

    Expert e has the rows from offsets_E[e - 1] (0 for the first expert) to offsets_E[e].
    """
    return experts._grouped_mm(A=a_RK, B_t=b_EKN, offs=offsets_E)


def multiply_grouped_in_float8(a_RK: torch.Tensor, b_EKN: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
    """Multiply as `multiply_grouped` does, in float8, with bfloat16 operands and results.

    Every expert has a multiple of 16 rows, and at least 16. torchao's kernels need Triton and a GPU.
    """
    from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm as multiply

    return multiply(a_RK, b_EKN, offsets_E, pad_token_groups_for_grouped_mm=False)


def describe_float8_rows(*, emulate: bool) -> object:
    """Return torchao's configuration of float8 linears with a scale for each row.

    On a GPU inductor keeps the casts of fused kernels, as torchtitan sets it for this recipe (pytorch issue 150859).
    """
    import spmd_types as spmd
    from torch._inductor import config as inductor_config
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    if not emulate:
        inductor_config.emulate_precision_casts = True
    spmd.register_local_autograd_function(matmul_with_hp_or_float8_args)
    return replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=emulate)


def round_to_float8(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x times a scale for each vector along `dim`, rounded to float8 (e4m3), and the scales, float32.

    The scales are powers of 2, as those of torchao's grouped product.
    """
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

    scale = tensor_to_scale(
        x, torch.float8_e4m3fn, scaling_granularity=ScalingGranularity.AXISWISE, axiswise_dim=dim,
        round_scales_to_power_of_2=True,
    )  # fmt: skip
    return to_fp8_saturated(x.float() * scale, torch.float8_e4m3fn), scale


def round_groups_to_float8(x_RD: torch.Tensor, offsets_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x times a scale for each column of each expert's rows, rounded to float8, and the scales [E, D]."""
    from torchao.prototype.moe_training.utils import torch_to_float8_per_group_colwise

    values_RD, scales = torch_to_float8_per_group_colwise(x_RD, offsets_E, round_scales_to_power_of_2=True)
    return values_RD, scales.view(len(offsets_E), x_RD.shape[1])


def make_shard_reader(folder: str, entry: dict[str, Any]) -> "MDSReader":
    """Return the reader of one shard in a folder, from the shard's entry in index.json.

    streaming's own way makes a reader of every shard of the folder at once.
    """
    from streaming.base.format import reader_from_json  # here, because other users of this module do not need streaming

    return cast("MDSReader", reader_from_json(folder, None, entry))


def download_file(address: str, path: Path) -> None:
    """Download one file from any address that streaming understands (s3://, gs://, hf://, ...).

    Raises:
        Exception: the file is missing or the store cannot be reached; the type depends on the store's client.
    """
    from streaming.base.storage import CloudDownloader

    CloudDownloader.direct_download(address, str(path))
