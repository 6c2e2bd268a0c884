"""Tokens a second, time of the first step and peak memory of a training on one rank, and the kernels of a step."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.one_rank import Training, build_trainer, make_step
from titan_ext.cpu.device import IS_CPU
from titan_ext.memory import estimate_memory
from titan_ext.model_stats import training_flops_per_token

KERNELS = 60
"""Number of kernels that a profile names; the rest is one sum."""


def measure_throughput(save: Callable[[dict[str, Any]], None], training: Training, folder: Path, steps: int) -> None:
    """Train steps and save after each what is known.

    The first step compiles and the second one makes AdamW's moments and the allocator's blocks, so neither counts.
    """
    stage, dims = training.stage, training.dims
    estimate = estimate_memory(dims, stage, training.parallel).peak
    found: dict[str, Any] = {
        "tokens_a_step": stage.global_batch_size * stage.seq_len,
        "flops_a_token": training_flops_per_token(dims, stage.seq_len),
        "estimated_bytes": estimate,
    }
    save(found)
    if not IS_CPU and estimate > (room := torch.cuda.mem_get_info()[1]):
        found["skipped"] = f"the estimate is {estimate / 1e9:.0f} GB, and the card has {room / 1e9:.0f}"
        save(found)
        return
    start = time.perf_counter()
    step = make_step(build_trainer(training, folder))
    found["build_seconds"] = time.perf_counter() - start
    save(found)
    found["first_step_seconds"] = step()
    save(found)
    step()
    times = []
    if not IS_CPU:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        times.append(step())
        found |= {
            "steps": len(times),
            "step_seconds": times,
            "tokens_a_second": found["tokens_a_step"] / statistics.median(times),
            "peak_bytes": None if IS_CPU else torch.cuda.max_memory_allocated(),
            "reserved_bytes": None if IS_CPU else torch.cuda.max_memory_reserved(),
        }
        save(found)


def profile_kernels(save: Callable[[dict[str, Any]], None], training: Training, folder: Path) -> None:
    """Profile one step and save the time of every kind of kernel, the longest first.

    On a GPU the times are those of its kernels; on the CPU those of the operators.
    """
    step = make_step(build_trainer(training, folder))
    step(), step()
    activities = [ProfilerActivity.CPU] if IS_CPU else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    unprofiled = step()
    with profile(activities=activities) as profiled:
        seconds = step()
    kernels = [
        (event.key, event.count, event.self_cpu_time_total if IS_CPU else event.self_device_time_total)
        for event in profiled.key_averages()
        if IS_CPU or (event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation)
    ]
    kernels.sort(key=lambda kernel: -kernel[2])
    save(
        {
            "step_seconds": unprofiled,
            "profiled_step_seconds": seconds,
            "kernel_seconds": sum(kernel[2] for kernel in kernels) / 1e6,
            "kernels": [
                {"name": name, "calls": calls, "milliseconds": time / 1e3} for name, calls, time in kernels[:KERNELS]
            ],
            "others_milliseconds": sum(kernel[2] for kernel in kernels[KERNELS:]) / 1e3,
        }
    )
