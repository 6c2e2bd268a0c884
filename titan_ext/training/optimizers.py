"""torchtitan's optimizers, with a way to skip an update, and with the options of the configuration after a load."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import OptimizersContainer

from core.errors import RefusedInput
from titan_ext.compat import set_found_inf


class SkippableOptimizers(OptimizersContainer):
    """torchtitan's optimizers; `step` leaves parameters and optimizer state unchanged while `skip` is 1.

    The trainer sets `skip` before every step (StageTrainer). It is a tensor on the device, which the fused kernels read
    as they read the overflow of a gradient scaler: the host need not know. PyTorch runs the registered step hooks in
    both cases.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        def __post_init__(self) -> None:
            if not self.implementation.startswith("fused"):
                raise RefusedInput(
                    f"optimizer.implementation = {self.implementation}: only fused optimizers can skip an update "
                    "without a wait for the device; choose fused"
                )

    skip: torch.Tensor | None = None
    """float32 [], 1.0 to leave out the next update, 0.0 to carry it out; None carries it out."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the parameters unless `skip` is 1.

        It does not call the base class's method, because PyTorch would then run the step hooks twice.
        """
        assert closure is None, "a closure would compute the loss again"
        for optimizer in self.optimizers:
            set_found_inf(optimizer, self.skip)
            optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments of a checkpoint, and keep this configuration's betas, weight decay and highest rate.

        The learning rate of the next step is the schedule's (StageTrainer).
        """
        options = [
            {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        super().load_state_dict(state_dict)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, options, strict=True):
            group.update(own)
