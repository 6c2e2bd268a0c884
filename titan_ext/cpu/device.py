"""Selects the CPU as torchtitan's device where no accelerator is present (1, 3 and 8 in titan_ext/cpu/__init__.py)."""

import os
import platform
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torchtitan.tools.utils as titan_utils

from core.cache import keep_compiled_code_apart
from titan_ext.cards import CARDS, Card, Machine
from titan_ext.compat import run_gloo_in_one_thread
from titan_ext.cpu.allocator import keep_freed_memory

IS_CPU = not torch.accelerator.is_available()
"""Whether this process trains on the CPU."""

SPMD_BACKEND = "partial_dtensor" if IS_CPU else "spmd_types"
"""torchtitan's `parallelism.spmd_backend`. Its default, spmd_types, exchanges tokens with `dist.all_to_all`, which gloo
lacks; partial_dtensor uses all_to_all_single."""

CONTEXT_PARALLEL_LOAD_BALANCER = None if IS_CPU else "headtail"
"""torchtitan's `parallelism.context_parallel_load_balancer`. DocumentAttention needs sequences in order. The masks of
flex attention follow a load balancer."""


def find_machine() -> Machine | None:
    """Return the card here with the memory that it has; None for training on the CPU.

    A card that `titan_ext.cards` does not know is taken for an H100, and so is another accelerator.
    """
    if IS_CPU:
        return None
    if not torch.cuda.is_available():  # another accelerator, or tests that trace what a GPU would run
        return Machine()
    properties = torch.cuda.get_device_properties(0)
    card = next((card for name, card in CARDS.items() if name in properties.name), Card())
    return Machine(replace(card, memory=properties.total_memory))


class _CPUDeviceModule:
    """torch.cpu with the calls of torch.cuda that torchtitan's trainer makes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        # torch.cpu returns a string. torchtitan passes the value to barrier(device_ids=[...]), which needs a number.
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


def use_cpu() -> None:
    """Make torchtitan use the CPU where no accelerator is present. On an accelerator the device stays as it is.

    Compiled code is kept apart from that of other kinds of machines in either case. The function may be called more
    than once.

    torchtitan reads the device when it builds a trainer, so a call after its modules were imported is early enough.
    Modules that copied `device_type` and `device_module` from `torchtitan.tools.utils` get the new values.
    """
    keep_compiled_code_apart()
    if not IS_CPU:
        return
    keep_freed_memory()
    run_gloo_in_one_thread()
    titan_utils.device_type = "cpu"
    titan_utils.device_module = _CPUDeviceModule()
    for name, module in list(sys.modules.items()):
        if not name.startswith("torchtitan."):
            continue
        for attribute in ("device_type", "device_module"):
            if hasattr(module, attribute):
                setattr(module, attribute, getattr(titan_utils, attribute))
    # torchtitan's router asks for float32 autocast. The CPU declines with a warning, but our gate is float32 anyway.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
