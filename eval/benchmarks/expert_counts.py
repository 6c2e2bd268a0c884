"""`ExpertCounts`: which experts a MobileMoE model's tokens take, counted while it computes."""

from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from eval.hf_mobilemoe.modeling_mobilemoe import MobileMoEFeedForward


class ExpertCounts:
    """Counts of tokens by layer and expert; a model without experts has no layers.

    Used as a context: the model is watched inside of it. Set `real_BT` before every forward pass.
    """

    def __init__(self, model: PreTrainedModel):
        self._layers = [module for module in model.modules() if isinstance(module, MobileMoEFeedForward)]
        self.counts = [torch.zeros(layer.router.out_features, dtype=torch.int64) for layer in self._layers]
        self.real_BT: torch.Tensor | None = None
        """True for tokens, False for padding, of the forward pass."""
        self._handles: list[Any] = []

    def __enter__(self) -> "ExpertCounts":
        """Begin to count."""
        for number, layer in enumerate(self._layers):

            def count(router: Any, inputs: Any, scores_TE: torch.Tensor, number: int = number) -> None:
                layer = self._layers[number]
                experts_TK = (scores_TE + layer.expert_bias.float()).topk(layer.top_k, dim=-1).indices
                assert self.real_BT is not None, "real_BT is set before the forward pass"
                chosen = experts_TK[self.real_BT.flatten()].flatten().cpu()
                self.counts[number] += torch.bincount(chosen, minlength=len(self.counts[number]))

            self._handles.append(layer.router.register_forward_hook(count))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    def shares(self) -> list[list[float]]:
        """Return every layer's share of its tokens' choices by expert, with 6 digits."""
        return [[round(share, 6) for share in (c / max(1, int(c.sum()))).tolist()] for c in self.counts]
