"""Token sequences in the KV cache of a causal model of transformers, and what follows them."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MAX_PADDING = 0.1
"""Share of a batch that may be padding, once the batch is large enough."""
ENOUGH = 1 / 8
"""Share of the limit at which a batch is large enough to pass alone."""


@dataclass
class Rows:
    """Sequences in the KV cache, one a row. `CachedModel` makes and extends them."""

    cache: DynamicCache
    mask_BL: torch.Tensor
    """int64, 0 for padding, as long as the cache."""
    lengths_B: torch.Tensor
    """Number of tokens of each row, without padding."""

    def select(self, indices: Sequence[int]) -> "Rows":
        """Return some of the rows, any of them several times. The rows of `self` stay as they are."""
        index_B = torch.tensor(indices, device=self.mask_BL.device)
        # Layers replace their tensors when they grow and never write into them, so shallow copies are enough.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(index_B)
        return Rows(cache, self.mask_BL[index_B], self.lengths_B[index_B])


class CachedModel:
    """A causal model that appends tokens to rows of its cache."""

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None):
        """Wrap a model that `can_continue`.

        Args:
            autocast: dtype of its products where that is not the weights'.
        """
        self._model, self._autocast = model, autocast

    def extend(self, before: Rows | None, rests: Sequence[Sequence[int]]) -> tuple[Rows, torch.Tensor]:
        """Append a rest, at least one token, to a copy of the one row before it for each; padded on the left.

        Returns:
            The rows, and the logits [B, V] after the last token of each.
        """
        device = self._model.device
        length = max(map(len, rests))
        ids_BL = torch.tensor([[*[0] * (length - len(ids)), *ids] for ids in rests], device=device)
        counts_B = torch.tensor([len(ids) for ids in rests], device=device)
        if before is None:
            rows = Rows(DynamicCache(config=self._model.config), ids_BL[:, :0], torch.zeros_like(counts_B))
        else:
            rows = before.select([0] * len(rests))
        steps_BL = torch.arange(length, device=device) - (length - counts_B[:, None])
        # Padding has the position of the first token, which is real.
        positions_BL = rows.lengths_B[:, None] + steps_BL.clamp(min=0)
        logits_BLV = self._append(rows, ids_BL, steps_BL >= 0, positions_BL, keep=1)
        rows.lengths_B = rows.lengths_B + counts_B
        return rows, logits_BLV[:, -1]

    def score(self, rows: Rows, continuations: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append a continuation to every row, padded on the right, and return the logits [B, L, V] after each token.

        The rows cannot be extended further. Logits of padding mean nothing.
        """
        device = self._model.device
        length = max(map(len, continuations))
        ids_BL = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in continuations], device=device)
        last_B1 = torch.tensor([[len(ids) - 1] for ids in continuations], device=device)
        index_L = torch.arange(length, device=device)
        # Padding has the position of the last token: a later one may be beyond the model's context.
        positions_BL = rows.lengths_B[:, None] + torch.minimum(index_L, last_B1)
        return self._append(rows, ids_BL, index_L <= last_B1, positions_BL, keep=0)

    def step(self, rows: Rows, ids_B: torch.Tensor) -> torch.Tensor:
        """Append one token to every row and return the logits [B, V] after it."""
        logits_BLV = self._append(
            rows, ids_B[:, None], torch.ones_like(ids_B[:, None], dtype=torch.bool), rows.lengths_B[:, None], keep=1
        )
        rows.lengths_B = rows.lengths_B + 1
        return logits_BLV[:, -1]

    def _append(
        self, rows: Rows, ids_BL: torch.Tensor, real_BL: torch.Tensor, positions_BL: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """Append tokens to all rows, in place, and return the logits of the last `keep` of them; 0 keeps all."""
        rows.mask_BL = torch.cat((rows.mask_BL, real_BL.long()), dim=1)
        device = self._model.device.type
        with torch.inference_mode(), torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return self._model(
                input_ids=ids_BL, attention_mask=rows.mask_BL, position_ids=positions_BL, past_key_values=rows.cache,
                use_cache=True, logits_to_keep=keep,
            ).logits  # fmt: skip


def can_continue(model: PreTrainedModel) -> bool:
    """Return whether sequences can go on from another's cache.

    They can if every layer attends to all tokens and the model takes positions and the number of logits to keep.
    """
    arguments = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or not {"position_ids", "logits_to_keep"} <= arguments.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def batch(lengths: Sequence[int], limit: int) -> Iterator[range]:
    """Yield the numbers of sequences that pass together: at most `limit` tokens, padding included, at least one.

    A batch that is large enough also ends where more than MAX_PADDING of it would be padding.

    Args:
        lengths: numbers of tokens, which fall, so that a batch is padded to its first.
    """
    start = 0
    while start < len(lengths):
        longest, real, end = lengths[start], 0, start
        while end < len(lengths):
            rows, filled = end + 1 - start, real + lengths[end]
            is_wasteful = filled < (1 - MAX_PADDING) * rows * longest and rows * longest > limit * ENOUGH
            if end > start and (rows * longest > limit or is_wasteful):
                break
            real, end = filled, end + 1
        yield range(start, end)
        start = end
