"""Drop-and-pad dispatch: in training every rank sends each expert exactly C tokens (GShard, arXiv 2006.16668).

    C = ceil(capacity_factor * T * K / E), at most T

Of the tokens of a rank's micro-batch that chose an expert, the C with the highest routing weights are sent. The others
are dropped: they get no output from that expert. An expert that fewer tokens chose is padded with rows of weight 0. So
no shape depends on the routing, and expert parallelism needs neither an exchange of counts nor a wait for the host.
Outside training nothing is dropped, so held-out losses are those of the exported model.

Shape suffixes: T tokens of this rank, K experts a token, E experts, e experts of this rank, C capacity, D model
dimension, R rows of this rank's experts (e * ranks * C), which are as many as the rows of its tokens (E * C).
"""

import math
from dataclasses import dataclass

import spmd_types as spmd
import torch
from torchtitan.distributed.spmd_types import maybe_set_sparse_mesh
from torchtitan.models.common.moe import RoutedExperts

from titan_ext.compat import return_rows_to_tokens, send_rows_to_experts
from titan_ext.dtensor import local
from titan_ext.mobilemoe.token_dispatch import DispatchMetadata, Routing, TokenDispatcher, reinterpret_mesh


@dataclass(frozen=True, kw_only=True)
class CapacityMetadata(DispatchMetadata):
    """The data that `combine` needs after a dispatch that dropped and padded. The type tells it from a dropless one."""


def keep_highest_weights(
    scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, num_experts: int, capacity: int
) -> Routing:
    """Return the routing to `capacity` rows an expert: the tokens with the highest weights of those that chose it.

    Args:
        scores_TK: float32 above 0, routing weights of the chosen experts.
        expert_ids_TK: int64, numbers of the chosen experts.
        num_experts: E.
        capacity: C, at most T.
    """
    T, R = len(scores_TK), num_experts * capacity
    with torch.no_grad():
        chosen_ET = scores_TK.new_zeros(num_experts, T).scatter(0, expert_ids_TK.T, scores_TK.T)
        # Weights are above 0, so the tokens that did not choose the expert are the last, with weight 0. Those that are
        # still among the C are the padding. The order of the C does not matter, and finding it would take time.
        weight_EC, token_EC = chosen_ET.topk(capacity, dim=1, sorted=False)
        number_EC = torch.arange(R, device=token_EC.device).view(num_experts, capacity)
        # Row of each token in each expert; R where it has none. No two rows of an expert hold the same token.
        row_ET = token_EC.new_full((num_experts, T), R).scatter(1, token_EC, number_EC)
        row_TK = row_ET.T.gather(1, expert_ids_TK)
        kept_TK = row_TK < R
        row_TK = torch.where(kept_TK, row_TK, 0)
    return Routing(
        token_R=token_EC.flatten(),
        weight_R=weight_EC.flatten(),
        row_TK=row_TK,
        weight_TK=scores_TK,
        kept_TK=kept_TK,
    )


class CapacityTokenDispatcher(TokenDispatcher):
    """Sends each expert its C tokens with the highest routing weights in training, and all tokens otherwise."""

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        capacity_factor: float
        """Capacity of an expert, in multiples of its share of perfectly balanced tokens; at least 1."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.capacity_factor = config.capacity_factor
        self.dropping = True
        """Whether tokens are dropped now; `CapacityRoutedExperts.train` sets it."""

    def capacity(self, num_tokens: int) -> int:
        """Return C, the number of tokens that an expert takes of a rank's `num_tokens`."""
        return min(num_tokens, math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts))

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """Return what `TokenDispatcher.dispatch` does, in training with C rows of this rank for each expert.

        Args:
            num_local_tokens_per_expert_E: only the dropless dispatch reads it; the others are as there.
        """
        if not self.dropping:
            return super().dispatch(x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E)
        C = self.capacity(x_TD.shape[0])
        routing = keep_highest_weights(topk_scores_TK, topk_expert_ids_TK, self.num_experts, C)
        rows_RD = self.gather_tokens(x_TD, routing)
        num_ranks = 1 if self.ep_mesh is None else self.ep_mesh.size()
        if num_ranks > 1:
            rows_RD = self._send_equal_parts(rows_RD, num_ranks)
        counts_e = torch.full((self.num_experts // num_ranks,), num_ranks * C, dtype=torch.int64, device=x_TD.device)
        return rows_RD, counts_e, CapacityMetadata(routing=routing, exchange=None)

    def combine(self, routed_output_RD: torch.Tensor, metadata: DispatchMetadata, x_TD: torch.Tensor) -> torch.Tensor:
        """Return for each token the sum of its experts' outputs, times the routing weights, [T, D]."""
        if not isinstance(metadata, CapacityMetadata):
            return super().combine(routed_output_RD, metadata, x_TD)
        if self.ep_mesh is not None and (num_ranks := self.ep_mesh.size()) > 1:
            routed_output_RD = self._return_equal_parts(routed_output_RD, num_ranks)
        return self.sum_outputs(routed_output_RD, metadata.routing)

    def _send_equal_parts(self, rows_RD: torch.Tensor, num_ranks: int) -> torch.Tensor:
        """Send this rank's rows to the ranks of their experts, and return the rows of this rank's experts."""
        R, D = rows_RD.shape
        splits = [R // num_ranks] * num_ranks
        with maybe_set_sparse_mesh():
            rows_RD = send_rows_to_experts(self, reinterpret_mesh(rows_RD), self.expert_group(), splits, splits)
            # They arrive sorted by rank, then by expert; grouped products need them sorted by expert.
            return rows_RD.view(num_ranks, self.num_experts // num_ranks, -1, D).transpose(0, 1).reshape(R, D)

    def _return_equal_parts(self, rows_RD: torch.Tensor, num_ranks: int) -> torch.Tensor:
        """Send the experts' outputs back to the ranks of their tokens: the reverse of `_send_equal_parts`."""
        R, D = rows_RD.shape
        splits = [R // num_ranks] * num_ranks
        with maybe_set_sparse_mesh():
            rows_RD = rows_RD.view(self.num_experts // num_ranks, num_ranks, -1, D).transpose(0, 1).reshape(R, D)
            rows_RD = return_rows_to_tokens(self, rows_RD, self.expert_group(), splits, splits)
        return reinterpret_mesh(rows_RD)


class CapacityRoutedExperts(RoutedExperts):
    """Routed experts that turn dropping off outside training, and count the dropped choices."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    num_dropped: torch.Tensor

    def __init__(self, config: Config):
        super().__init__(config)
        # Number of choices dropped on this rank since the metrics were last read.
        self.register_buffer("num_dropped", torch.zeros((), dtype=torch.float32), persistent=False)

    def train(self, mode: bool = True) -> "CapacityRoutedExperts":
        """Set training mode, in which tokens are dropped, or evaluation mode, in which none are."""
        self.token_dispatcher.dropping = mode
        return super().train(mode)

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        """Return the routed experts' output [B, L, D], as torchtitan's RoutedExperts, and count the dropped choices."""
        if self.training:
            capacity = self.token_dispatcher.capacity(x_BLD.shape[0] * x_BLD.shape[1])
            # The counter is a sum over one rank's tokens and is reduced only when metrics are read. torchtitan's type
            # checker has no type for that, so it is off here.
            with torch.no_grad(), spmd.no_typecheck():
                local(self.num_dropped).add_((num_local_tokens_per_expert_E - capacity).clamp(min=0).sum())
        return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.num_dropped = torch.zeros((), dtype=torch.float32, device=buffer_device or self.num_dropped.device)
