"""Callbacks of StageTrainer: each adds one thing to the loop and is called at named points of every optimizer step.

The order of a step: forward and backward passes of all micro-batches, `after_backward`, clipping of the gradients, the
decision whether the update is skipped (`titan_ext.training.spike_guard`), the optimizers, `after_update`. The host does
not know yet then whether the device has skipped the update. The other callbacks are
`titan_ext.training.spike_guard.SpikeGuard` and `titan_ext.training.distillation.Distillation`.
"""

from titan_ext.mobilemoe.tied_embedding_pp import TiedEmbedding


class Callback:
    """Base class whose hooks do nothing. The trainer calls the hooks on every rank, in the same order."""

    def before_first_step(self) -> None:
        """Prepare for training. The checkpoint that the stage resumes from is loaded already."""

    def after_backward(self) -> None:
        """Change or read the gradients of the whole optimizer step, before their norm is taken and clipped."""

    def after_update(self) -> None:
        """React to the step of the optimizers. The parameters are what they were if the update was skipped."""

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
