"""What torchtitan 0.3.0 needs to train on the CPU, in one place. On an accelerator nothing here is active.

`apply()` must run before torchtitan reads a configuration: other modules of it bind `device_type` and `device_module`
at import, and those that did are bound anew. Importing `titan_ext.mobilemoe` or `titan_ext.training.train` does that.

1. torchtitan falls back to "cuda" where there is no accelerator: `apply` sets the CPU and a device module with the
   memory calls that the trainer makes.
2. FSDP averages with PREMUL_SUM, which gloo refuses, and where one rank holds all of a parameter it copies whole
   gradients twice to reduce them with nobody: `adapt_reductions`.
3. The expert exchange must use all_to_all_single with split sizes (gloo has no list all_to_all): `SPMD_BACKEND`.
4. Flex attention has no CPU backward and varlen is CUDA only: `titan_ext.mobilemoe.attention.DocumentAttention`.
5. CUDA graphs are off: `titan_ext.training.trainer_config`.
6. DTensor has no sharded random numbers on the CPU: every rank would fill its shard from the same seed, and the experts
   of two ranks would start as twins. `normal_init` draws the whole tensor and keeps the shard; for stages of a
   pipeline see `titan_ext.mobilemoe.model.MobileMoEModel.init_states`.
7. torch._grouped_mm has no backward for a rank that got no token: `titan_ext.mobilemoe.moe.Experts`.
8. local_map waits for an input that is still being gathered outside of autograd: under tensor parallelism without
   expert parallelism the routed experts' input would get no gradient: `keep_gradients_of_gathered_inputs`.
9. glibc gives large blocks back to the system and every step faults them in again: `titan_ext.cpu.allocator`.
10. oneDNN prepares a bfloat16 product anew for every number of rows, and experts never see the same number twice:
    `pad_groups`.
11. Blocks are not compiled, and a quantizer makes a dozen passes over a weight: `fuse_if_large` compiles it alone.
12. Rank 0 sleeps two seconds at the end of a training, for the others to finish first: over gloo a barrier tells when
    they have, `StageTrainer.train`.
"""

import functools
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torchtitan.tools.utils as titan_utils
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo
from torch.distributed.tensor import DTensor, Replicate

from titan_ext.cpu.allocator import keep_freed_memory
from titan_ext.dtensor import local

IS_CPU = not torch.accelerator.is_available()

SPMD_BACKEND = "partial_dtensor" if IS_CPU else "spmd_types"
"""torchtitan's default exchanges tokens with `dist.all_to_all`, which gloo lacks; this one uses all_to_all_single."""


CONTEXT_PARALLEL_LOAD_BALANCER = None if IS_CPU else "headtail"
"""DocumentAttention keeps sequences in their order; flex attention's masks follow a load balancer."""


class _CPUDeviceModule:
    """torch.cpu plus the calls of torch.cuda that torchtitan's trainer makes."""

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        # torch.cpu answers with a string, which barrier(device_ids=[...]) refuses.
        return 0

    def get_device_name(self, device: object = None) -> str:
        return platform.processor() or platform.machine()

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, device: object = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: object = None) -> None:
        return None

    def empty_cache(self) -> None:
        return None


def apply() -> None:
    """Make torchtitan use the CPU where no accelerator is present. Idempotent; does nothing on an accelerator."""
    if not IS_CPU:
        return
    keep_freed_memory()
    titan_utils.device_type = "cpu"
    titan_utils.device_module = _CPUDeviceModule()
    for name, module in list(sys.modules.items()):  # under `-m torchtitan.train` they are there already
        for attribute in ("device_type", "device_module"):
            if name.startswith("torchtitan.") and hasattr(module, attribute):
                setattr(module, attribute, getattr(titan_utils, attribute))
    # torchtitan's router asks for float32 autocast, which the CPU declines with a warning; our gate is float32 anyway.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")


TRAINER_CLOCK = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None) if IS_CPU else time
"""What torchtitan.trainer uses of `time`; its one sleep is rank 0's at the end."""


ROWS_MULTIPLE = 32


def pad_groups(x_RD: torch.Tensor, counts_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows grouped by expert, every group filled up with zeros to a multiple of 32 rows.

    Args:
        x_RD: rows sorted by expert.
        counts_E: int64, rows of each expert.

    Returns:
        The filled-up rows [P, D], rows of each expert int64 [E] in them, and where each row of x is int64 [R].
    """
    padded_E = (counts_E + ROWS_MULTIPLE - 1) // ROWS_MULTIPLE * ROWS_MULTIPLE
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    rows_R = torch.arange(x_RD.shape[0]) + torch.repeat_interleave(shift_E, counts_E)
    padded_PD = x_RD.new_zeros(int(padded_E.sum()), x_RD.shape[1]).index_copy(0, rows_R, x_RD)
    return padded_PD, padded_E, rows_R


COMPILED_ELEMENTS = 1 << 20
"""From this size on a fused kernel saves more in a hundred steps than its compilation costs."""


def fuse_if_large(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, compiled on the CPU for large plain tensors; as it is elsewhere, and where there is no C++ compiler.

    Args:
        function: takes a tensor first; what it computes must not depend on rounding that fusion leaves out.
    """
    if not IS_CPU or shutil.which(os.environ.get("CXX", "g++")) is None:
        return function
    compiled = torch.compile(function)

    @functools.wraps(function)
    def fused(x: torch.Tensor, *args) -> torch.Tensor:
        if torch.compiler.is_compiling():  # inside of a compiled block, whose rows may be known to nobody yet
            return function(x, *args)
        large = x.numel() >= COMPILED_ELEMENTS and not isinstance(x, DTensor)
        return (compiled if large else function)(x, *args)

    return fused


class _ReductionAlone(ReduceScatter):
    """The reduction of a group of one rank: what FSDP2 has copied together is what it would copy out."""

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """FSDP2 asks for a reduction's input and then for its output, of the same size: one block for both."""
        if self._input is None:
            self._input = torch.empty(*size, dtype=dtype, device=device)
            return self._input
        output, self._input = self._input, None
        assert output.shape == tuple(size) and output.dtype == dtype, "FSDP2 allocates in another order"
        return output

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("FSDP2 communicates in a group of one rank")


def adapt_reductions(model: torch.nn.Module) -> None:
    """Let every FSDP unit of `model` reduce gradients with SUM, the only reduction gloo offers. CPU only.

    And without the two copies of a group of one rank: there, torchtitan's division by one would make another.
    """
    if not IS_CPU:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if not isinstance(group.mesh_info, DDPMeshInfo) and group._reduce_scatter_process_group.size() == 1:
                    group._reduce_scatter_comm = _ReductionAlone()
                    group.gradient_divide_factor = None


def keep_gradients_of_gathered_inputs(module: torch.nn.Module) -> None:
    """Copy the inputs of `module`, a local_map region, that are still being gathered when it is called. CPU only."""
    if not IS_CPU:
        return

    def arrived(value: object) -> object:
        gathering = isinstance(value, DTensor) and isinstance(value._local_tensor, AsyncCollectiveTensor)
        return value.clone() if gathering else value

    module.register_forward_pre_hook(lambda module, inputs: tuple(map(arrived, inputs)))


def normal_init(std: float) -> Callable[[torch.Tensor], object]:
    """Initialiser that fills a parameter in place with normal values, the same whole tensor under every layout."""
    if not IS_CPU:
        return functools.partial(torch.nn.init.normal_, std=std)

    @torch.no_grad()
    def fill(parameter: torch.Tensor) -> None:
        whole = torch.nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std)
        if isinstance(parameter, DTensor):  # every rank has the same seed, so the same whole tensor
            mesh = parameter.device_mesh
            whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
            whole = whole.redistribute(placements=parameter.placements).to_local()
        local(parameter).copy_(whole)

    return fill
