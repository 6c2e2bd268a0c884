"""Makes this process believe in an H100, so that inductor writes the Triton code that it would write for one.

Nothing can run on it. The numbers are those of an H100 SXM (compute capability 9.0).
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30,
    regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472,
    L2_cache_size=50 << 20, gcnArchName="", uuid="", is_integrated=0, is_multi_gpu_board=0, clock_rate=1_980_000,
    memory_clock_rate=2_619_000, memory_bus_width=5120,
)  # fmt: skip


def _get_properties(device: Any = None) -> SimpleNamespace:
    return PROPERTIES


@contextlib.contextmanager
def mock_h100() -> Iterator[None]:
    """Believe in an H100 inside of the block. Trace models outside of it: their tensors stay on the CPU."""
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    replaced = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_properties": _get_properties, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: PROPERTIES.name, "is_bf16_supported": lambda *args, **kwargs: True,
        "synchronize": lambda device=None: None, "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0, "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8, device="cpu"),
    }  # fmt: skip
    target = GPUTarget("cuda", 90, PROPERTIES.warp_size)
    limits = {
        "max_shared_mem": PROPERTIES.shared_memory_per_block_optin, "max_num_regs": 65_536,
        "multiprocessor_count": PROPERTIES.multi_processor_count, "warpSize": PROPERTIES.warp_size,
    }  # fmt: skip
    mocked = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device=0: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: limits),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, function))
            own = name.removeprefix("_")
            if hasattr(CudaInterface, own):
                stack.enter_context(patch.object(CudaInterface, own, staticmethod(function)))
        worker = CudaInterface.Worker
        stack.enter_context(patch.object(worker, "get_device_properties", staticmethod(_get_properties)))
        stack.enter_context(patch.object(worker, "current_device", staticmethod(lambda: 0)))
        ignore = staticmethod(lambda device=None: None)
        stack.enter_context(patch.object(CudaInterface, "raise_if_triton_unavailable", ignore))
        stack.enter_context(patch.object(driver, "_active", mocked))
        has_triton.cache_clear()  # it has looked for a device before
        stack.callback(has_triton.cache_clear)
        yield
