"""Callbacks of StageTrainer: each adds one thing to the loop and is called at named points of every optimizer step.

The order of a step: forward and backward passes of all micro-batches, `after_backward`, `check_update`, then either the
optimizer and `after_update`, or `before_skipped_update` and no update. The other callbacks are
`titan_ext.training.spike_guard.SpikeGuard` and `titan_ext.training.distillation.Distillation`.
"""

import torch

from titan_ext.mobilemoe.load_metrics import clear_load, record_load
from titan_ext.mobilemoe.tied_embedding_pp import TiedEmbedding


class Callback:
    """Base class whose hooks do nothing. The trainer calls the hooks on every rank, in the same order."""

    def before_first_step(self) -> None:
        """Prepare for training. The checkpoint that the stage resumes from is loaded already."""

    def after_backward(self) -> None:
        """Change or read the gradients of the whole optimizer step, before their norm is taken and clipped."""

    def check_update(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Return the reason why the update of this step must be skipped, or None to accept it.

        Args:
            step: number of the step, the first is 1.
            loss: mean over the trained tokens of all ranks, nats a token.
            grad_norm: norm of the gradients of all ranks, before clipping.
        """

    def before_skipped_update(self) -> None:
        """Undo side effects of the skipped step. The step hooks of the optimizers still run after this call."""

    def after_update(self) -> None:
        """React to an update of the parameters. It is not called after a skipped update."""

    def metrics(self) -> dict[str, float]:
        """Return values for the metrics files, by TensorBoard tag. All ranks call it, so it may use collectives."""
        return {}


class TiedEmbeddingCallback(Callback):
    """Keeps the two copies of the tied embedding equal, which the first and last stage of a pipeline hold."""

    def __init__(self, tied_embedding: TiedEmbedding):
        self._tied_embedding = tied_embedding

    def before_first_step(self) -> None:
        """Copy the owner's values, which are initial weights or come from any checkpoint, to the replica."""
        self._tied_embedding.sync_tied_weight()

    def after_backward(self) -> None:
        """Add the replica's gradient to the owner's."""
        self._tied_embedding.reduce_tied_grad()

    def after_update(self) -> None:
        """Copy the owner's new values to the replica."""
        self._tied_embedding.sync_tied_weight()


class SkippedLoadCallback(Callback):
    """Counts the expert load of a skipped step in the metrics, but not in the next update of the expert bias."""

    def __init__(self, model_parts: list[torch.nn.Module]):
        self._model_parts = model_parts

    def before_skipped_update(self) -> None:
        """Record the token counts and set them to zero: torchtitan's hook leaves the bias unchanged on zeros."""
        record_load(self._model_parts)
        clear_load(self._model_parts)
