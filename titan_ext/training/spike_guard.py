"""Decides before every optimizer step whether the update is safe: no update on non-finite numbers or on a spike.

A spike is a loss or a gradient norm more than `sigma` standard deviations above the mean of the last `WINDOW` steps.
Skipped steps enter the window as well. So if the loss stays at a new level, training continues after some steps.

The decision is made where the numbers are, and nobody waits for it: it is a tensor that the optimizers obey. The host
looks at the decisions now and then (`look`), to write them into the log and to stop the stage.
"""

import math
from typing import Any

import torch
from torchtitan.tools.logging import logger

from titan_ext.training.callbacks import Callback

WINDOW = 128
"""Number of most recent steps from which mean and standard deviation are computed."""
MIN_HISTORY = 32
"""Number of steps that the guard must have seen before it skips one."""


class NotFinite(RuntimeError):
    """Loss or gradient norm of a step is not finite; the parameters were not updated with them."""


class SpikeGuard(Callback):
    """Keeps loss and gradient norm of the last steps and compares every new step with them."""

    def __init__(self, sigma: float | None, device: torch.device | str = "cpu"):
        """Create a guard without history. With `sigma` None it skips nothing, but still stops on non-finite numbers."""
        self.sigma = sigma
        self._device = device
        self._seen = 0
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._has_failed = torch.zeros((), dtype=torch.bool, device=device)
        self._history_2W = torch.zeros(2, WINDOW, dtype=torch.float64, device=device)
        self._unseen: list[tuple[int, torch.Tensor]] = []  # step; loss and norm, and the limits of both, float64 [2, 2]

    @property
    def num_skipped(self) -> int:
        """Return the number of steps skipped since the stage began; the host waits for the device."""
        return int(self._num_skipped)

    @torch.no_grad()
    def decide(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Record a step, and return 1.0 if its update must be skipped, else 0.0: float32 [], on the device.

        After a step whose numbers are not finite all are skipped, until `look` stops the stage.

        Args:
            loss: mean over the trained tokens of all ranks, nats a token, of one element.
            grad_norm: norm of the gradients of all ranks, before clipping, of one element.
        """
        values_2 = torch.stack([loss.reshape(()), grad_norm.reshape(())]).double()
        limits_2 = self._compute_limits()
        self._has_failed |= ~values_2.isfinite().all()
        is_skipped = (values_2 > limits_2).any() | self._has_failed
        self._unseen.append((step, torch.stack([values_2, limits_2])))
        self._history_2W[:, self._seen % WINDOW] = values_2
        self._seen += 1
        self._num_skipped += is_skipped
        return is_skipped.float()

    def look(self) -> None:
        """Wait for the decisions since the last call, and write the skipped steps into the log.

        Raises:
            NotFinite: the loss or the gradient norm of a step is not finite; nothing was updated from that step on.
        """
        if not self._unseen:
            return
        steps = [step for step, _ in self._unseen]
        records = torch.stack([record for _, record in self._unseen]).tolist()
        self._unseen.clear()
        for step, (values, limits) in zip(steps, records, strict=True):
            if not all(map(math.isfinite, values)):
                raise NotFinite(
                    f"step {step}: loss {values[0]}, gradient norm {values[1]}: not finite, so the parameters were not "
                    "updated"
                )
            reasons = [
                f"{name} {value:.4g} is over {limit:.4g}"
                for name, value, limit in zip(("loss", "gradient norm"), values, limits, strict=True)
                if value > limit
            ]
            if reasons:
                logger.warning(f"step {step} is skipped: {' and '.join(reasons)} ({self.sigma} sigma above the mean)")

    def _compute_limits(self) -> torch.Tensor:
        if self.sigma is None or self._seen < MIN_HISTORY:
            return torch.full((2,), math.inf, dtype=torch.float64, device=self._device)
        known_2W = self._history_2W[:, : min(self._seen, WINDOW)]
        return torch.stack([known_W.mean() + self.sigma * known_W.std() for known_W in known_2W])

    def metrics(self) -> dict[str, float]:
        """Return the number of skipped steps."""
        return {"skipped_steps": self.num_skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the checkpoint, so that a resumed stage decides as an uninterrupted one would."""
        return {
            "num_skipped": self._num_skipped.cpu(),
            "seen": torch.tensor(self._seen),
            "history": self._history_2W.cpu().clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._num_skipped = state_dict["num_skipped"].to(self._device, copy=True)
        self._seen = int(state_dict["seen"])
        self._history_2W = state_dict["history"].to(self._device, copy=True)
