"""Decides before every optimizer step whether the update is safe: no update on non-finite numbers or on a spike.

A spike is a loss or a gradient norm more than `sigma` standard deviations above the mean of the last `WINDOW` steps.
Skipped steps enter the window as well. So if the loss stays at a new level, training continues after some steps.
"""

import math
from typing import Any

import torch

from titan_ext.training.callbacks import Callback

WINDOW = 128
"""Number of most recent steps from which mean and standard deviation are computed."""
MIN_HISTORY = 32
"""Number of steps that the guard must have seen before it skips one."""


class NotFinite(RuntimeError):
    """Loss or gradient norm of a step is not finite; the parameters were not updated with them."""


class SpikeGuard(Callback):
    """Keeps loss and gradient norm of the last steps and compares every new step with them.

    Attributes:
        num_skipped: number of steps skipped since the stage began.
    """

    def __init__(self, sigma: float | None):
        """Create a guard without history. With `sigma` None it skips nothing, but still stops on non-finite numbers."""
        self.sigma = sigma
        self.num_skipped = 0
        self._seen = 0
        self._history_2W = torch.zeros(2, WINDOW, dtype=torch.float64)

    def check_update(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Record a step's loss and gradient norm. Return the reason to skip the update, or None to accept it.

        Raises:
            NotFinite: the loss or the gradient norm is not finite; nothing was updated.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NotFinite(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so the parameters were not updated"
            )
        reasons = [
            f"{name} {value:.4g} is over {limit:.4g}"
            for name, value, row_W in zip(("loss", "gradient norm"), (loss, grad_norm), self._history_2W, strict=True)
            if value > (limit := self._compute_limit(row_W))
        ]
        self._history_2W[:, self._seen % WINDOW] = torch.tensor([loss, grad_norm], dtype=torch.float64)
        self._seen += 1
        self.num_skipped += bool(reasons)
        return f"{' and '.join(reasons)} ({self.sigma} sigma above the mean)" if reasons else None

    def _compute_limit(self, row_W: torch.Tensor) -> float:
        if self.sigma is None or self._seen < MIN_HISTORY:
            return math.inf
        known = row_W[: min(self._seen, WINDOW)]
        return float(known.mean() + self.sigma * known.std())

    def metrics(self) -> dict[str, float]:
        """Return the number of skipped steps."""
        return {"skipped_steps": self.num_skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint, so that a resumed stage decides as an uninterrupted one would."""
        return {
            "num_skipped": torch.tensor(self.num_skipped),
            "seen": torch.tensor(self._seen),
            "history": self._history_2W.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_skipped = int(state_dict["num_skipped"])
        self._seen = int(state_dict["seen"])
        self._history_2W = state_dict["history"].clone()
