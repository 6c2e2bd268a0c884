"""Decides before every optimizer step whether it may happen: never on numbers that are not finite, not on a spike.

A spike is a loss or a gradient norm more than `sigma` standard deviations above the mean of the last `WINDOW` steps.
Skipped steps enter the window as well, so training goes on at a level that has changed for good.
"""

import math
from typing import Any

import torch

WINDOW = 128
"""Steps that mean and deviation are taken over."""
MIN_HISTORY = 32
"""Steps seen before any is skipped."""


class UpdateGuard:
    """Loss and gradient norm of the last steps, and what they say of the next one.

    Attributes:
        num_skipped: steps skipped since the stage began.
    """

    def __init__(self, sigma: float | None):
        """`sigma` None skips nothing; numbers that are not finite are refused all the same."""
        self.sigma = sigma
        self.num_skipped = 0
        self._seen = 0
        self._history_2W = torch.zeros(2, WINDOW, dtype=torch.float64)

    def admit(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Take note of a step's loss and gradient norm; None if it may be taken, or why it is to be skipped.

        Raises:
            RuntimeError: one of the two is not finite; nothing was updated.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RuntimeError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so the parameters were not updated. "
                "Start again from the last checkpoint with a lower learning rate, or with other data"
            )
        reasons = [
            f"{name} {value:.4g} is over {limit:.4g}"
            for name, value, row_W in zip(("loss", "gradient norm"), (loss, grad_norm), self._history_2W, strict=True)
            if value > (limit := self._limit(row_W))
        ]
        self._history_2W[:, self._seen % WINDOW] = torch.tensor([loss, grad_norm], dtype=torch.float64)
        self._seen += 1
        self.num_skipped += bool(reasons)
        return f"{' and '.join(reasons)} ({self.sigma} sigma above the mean)" if reasons else None

    def _limit(self, row_W: torch.Tensor) -> float:
        if self.sigma is None or self._seen < MIN_HISTORY:
            return math.inf
        known = row_W[: min(self._seen, WINDOW)]
        return float(known.mean() + self.sigma * known.std())

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint, so that a resumed stage decides as the uninterrupted one would."""
        return {
            "num_skipped": torch.tensor(self.num_skipped),
            "seen": torch.tensor(self._seen),
            "history": self._history_2W.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped = int(state_dict["num_skipped"])
        self._seen = int(state_dict["seen"])
        self._history_2W = state_dict["history"].clone()
