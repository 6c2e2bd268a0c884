"""Every number of a recipe lies in a range: those below in their own, all others between two bounds.

The other files of rules say what fits together; this one refuses what no recipe means: nan, infinity, a share of 3, a
number of steps with a dozen zeros too many.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from pipelines.validation.problems import Problem

BOUND = 10**15
"""Largest size of any number: more than the tokens of all corpora, or the bytes of a run."""

RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, 100),
    "min_lr_factor": (0, 1),
    "decay_fraction": (0.001, 1),
    "weight_decay": (0, 1),
    "beta2": (0, 0.999999),
    "max_grad_norm": (1e-6, 1e6),
    "router_z_loss": (0, 1000),
    "expert_bias_update_rate": (0, 10),
    "capacity_factor": (1, 1000),
    "warmup_steps": (0, 10**9),
    "checkpoint_interval": (0, 10**9),
    "checkpoint_minutes": (0, 10**6),
    "checkpoint_permanent_tokens": (0, BOUND),
    "checkpoints_kept": (2, 10**6),
    "benchmark_interval": (0, 10**9),
    "quick_limit": (1, 10**9),
    "heldout_batches": (1, 10**6),
    "seed": (0, 2**32 - 1),
    "max_shard_bytes": (1, 2**50),
    "batch_tokens": (1, 2**24),
    "dashboard_port": (0, 65535),
    "hang_minutes": (0, 10**6),
}
"""Name of a field -> its smallest and largest value, where another file of rules does not state them."""


def find_range_problems(config: Any, prefix: str = "") -> Iterator[Problem]:
    """Yield a problem for each number in a tree of dataclasses that is out of its range."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from find_range_problems(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            least, most = RANGES.get(field.name, (-BOUND, BOUND))
            if not (math.isfinite(value) and least <= value <= most):
                yield Problem(name, value, f"must be {least:,} to {most:,}", "set a number in this range")
