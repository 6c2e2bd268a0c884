"""A context and all of its answers in one row: the context passes once, and no cache is copied from answer to answer.

Each answer sees the context and itself: a 4-D mask and positions that go on from the context for every answer anew.
Shape suffixes: B rows, L positions of a row, T targets of the batch, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from eval.benchmarks.shared_prefixes import Ids


@dataclass(frozen=True)
class PackedRow:
    """One context, and the answers that are scored after it."""

    context: Ids
    answers: tuple[Ids, ...]

    def __len__(self) -> int:
        """Return the number of tokens that pass: the last token of an answer is a target only."""
        return len(self.context) + sum(len(answer) - 1 for answer in self.answers)

    @property
    def targets(self) -> int:
        """Return the number of tokens that are scored."""
        return sum(map(len, self.answers))


def can_pack(model: PreTrainedModel) -> bool:
    """Return whether the model's attention takes a 4-D mask, and its output projection is a module of its own."""
    return model.config._attn_implementation in ("sdpa", "eager") and model.get_output_embeddings() is not None


def score_packed(
    model: PreTrainedModel, rows: Sequence[PackedRow], autocast: torch.dtype | None = None
) -> list[list[tuple[float, bool]]]:
    """Return (log-likelihood, whether greedy decoding gives it) of every answer of every row.

    Args:
        model: one for which `can_continue` and `can_pack` hold.
        autocast: dtype of its products where that is not the weights'.
    """
    device, length = model.device, max(map(len, rows))
    kept = max(len(row) - len(row.context) for row in rows) + 1
    ids_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    positions_BL = torch.zeros_like(ids_BL)
    # The part of a row that a position belongs to: 0 is the context, then the answers; -1 is padding.
    parts_BL = torch.full_like(ids_BL, -1)
    where_T: list[tuple[int, int]] = []
    targets_T: list[int] = []
    for b, row in enumerate(rows):
        at = length - len(row)
        start = at + len(row.context)
        ids_BL[b, at:start] = torch.tensor(row.context)
        positions_BL[b, at:start] = torch.arange(len(row.context))
        parts_BL[b, at:start] = 0
        at = start
        for number, answer in enumerate(row.answers, 1):
            end = at + len(answer) - 1
            ids_BL[b, at:end] = torch.tensor(answer[:-1], dtype=torch.int64)
            positions_BL[b, at:end] = len(row.context) + torch.arange(len(answer) - 1)
            parts_BL[b, at:end] = number
            # The first token is predicted at the end of the context, the others at the token before them.
            where_T += [(b, k - (length - kept)) for k in (start - 1, *range(at, end))]
            targets_T += answer
            at = end
    with (
        torch.inference_mode(),
        torch.autocast(device.type, autocast, enabled=autocast is not None),
        _project_only(model, where_T),
    ):
        logits_1TV = model(
            input_ids=ids_BL.to(device), attention_mask=_build_mask(parts_BL.to(device), model.dtype),
            position_ids=positions_BL.to(device), use_cache=False, logits_to_keep=kept,
        ).logits  # fmt: skip
        scores_T, greedy_T = score_targets(logits_1TV[0].float(), torch.tensor(targets_T, device=device))
    return _collect(rows, scores_T.tolist(), greedy_T.tolist())


@contextmanager
def _project_only(model: PreTrainedModel, where_T: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Let the output projection compute these (row, kept position) alone, as one row: padding has no logits.

    What a model does with its logits afterwards (scaling, capping) is done to each of them.
    """
    head = model.get_output_embeddings()
    rows_T, kept_T = torch.tensor(where_T, device=model.device).unbind(1)

    def select(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0][rows_T, kept_T][None],)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _build_mask(parts_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mask [B, 1, L, L] that is added to the scores: a token sees the context and its own answer so far."""
    query_BL1, key_B1L = parts_BL[:, :, None], parts_BL[:, None, :]
    sees_BLL = (key_B1L == 0) | (key_B1L == query_BL1)
    sees_BLL &= torch.ones_like(sees_BLL[0]).tril()
    return torch.zeros(sees_BLL.shape, dtype=dtype, device=parts_BL.device).masked_fill_(
        ~sees_BLL, torch.finfo(dtype).min
    )[:, None]


def score_targets(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of every target, float32, and whether it is the likeliest token.

    The logits are overwritten: a copy of them, half a megabyte a target with a large vocabulary, costs more than the
    arithmetic. Of equal logits the first is the likeliest, so only rows whose target has the largest are searched.
    """
    largest_T = logits_TV.amax(-1)
    chosen_T = logits_TV.gather(-1, targets_T[:, None])[:, 0]
    is_greedy_T = chosen_T == largest_T
    rows_G = is_greedy_T.nonzero()[:, 0]
    is_greedy_T[rows_G] = logits_TV[rows_G].argmax(-1) == targets_T[rows_G]
    sums_T = logits_TV.sub_(largest_T[:, None]).exp_().sum(-1)
    return chosen_T - largest_T - sums_T.log(), is_greedy_T


def _collect(rows: Sequence[PackedRow], scores_T: list[float], greedy_T: list[bool]) -> list[list[tuple[float, bool]]]:
    found: list[list[tuple[float, bool]]] = []
    at = 0
    for row in rows:
        found.append([])
        for answer in row.answers:
            end = at + len(answer)
            found[-1].append((sum(scores_T[at:end]), all(greedy_T[at:end])))
            at = end
    return found
