"""torchtitan's optimizers, with a way to skip an update, and with the options of the configuration after a load."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer


class SkippableOptimizers(OptimizersContainer):
    """torchtitan's optimizers; `step` leaves parameters and optimizer state unchanged while `skip_reason` is set.

    The trainer sets `skip_reason` before every step (StageTrainer). PyTorch runs the registered step hooks in both
    cases.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    skip_reason: str | None = None
    """Reason why the next update is skipped; None to carry it out."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update the parameters unless `skip_reason` is set.

        It does not call the base class's method, because PyTorch would then run the step hooks twice.
        """
        assert closure is None, "a closure would compute the loss again"
        if self.skip_reason is None:
            for optimizer in self.optimizers:
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
