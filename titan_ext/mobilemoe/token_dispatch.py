"""Dispatch of tokens to experts and the sum of their outputs, by gathers: every choice of every token is computed.

torchtitan's dispatcher adds with scatter-adds: sorted ones in `combine`, unsorted ones in the gradient of `dispatch`.
`TokenDispatcher` keeps, beside the tokens sorted by expert, the place of every choice among them, and so reads by index
in all four directions (`titan_ext.mobilemoe.row_gather`). `titan_ext.mobilemoe.capacity_dispatch` is the dispatch that
drops and pads.

Shape suffixes: T tokens of this rank, K experts a token, N = T * K, E experts, e experts of this rank, D model
dimension, R rows, P ranks of the expert-parallel group.
"""

from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.distributed as dist
from torchtitan.distributed.spmd_types import current_spmd_mesh, maybe_set_sparse_mesh
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from titan_ext.compat import exchange_counts, return_rows_to_tokens, send_rows_to_experts
from titan_ext.mobilemoe.row_gather import gather_rows, sum_rows


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which row holds which choice of which token, on the rank of the tokens. Rows are sorted by expert."""

    token_R: torch.Tensor
    """int64, token that each row holds."""
    weight_R: torch.Tensor
    """float32, routing weight of each row, without a gradient; 0 for padding."""
    row_TK: torch.Tensor
    """int64, row of each choice; 0 for a dropped one."""
    weight_TK: torch.Tensor
    """float32, routing weight of each choice, with its gradient."""
    kept_TK: torch.Tensor | None
    """bool, False for a dropped choice, which has no row; None: none is dropped."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How rows travel over the expert-parallel group. They arrive sorted by rank, then by expert."""

    sent: list[int]
    """Number of rows to each rank."""
    arriving: list[int]
    """Number of rows from each rank."""
    arrival_R: torch.Tensor
    """int64, place among the arrived rows of each row sorted by expert."""
    sorted_R: torch.Tensor
    """int64, the reverse: place among the rows sorted by expert of each arrived row."""


@dataclass(frozen=True, kw_only=True)
class DispatchMetadata:
    """The data that `combine` needs after `dispatch`."""

    routing: Routing
    exchange: Exchange | None
    """None without expert parallelism."""


@torch.no_grad()
def sort_by_expert(expert_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the choices sorted by expert, int64 [N], and the place of each choice among them, int64 [T, K].

    Choice k of token t has the number t * K + k. Choices of one expert keep their order.
    """
    choice_N = torch.argsort(expert_ids_TK.flatten(), stable=True)
    row_N = torch.empty_like(choice_N).scatter(0, choice_N, torch.arange(len(choice_N), device=choice_N.device))
    return choice_N, row_N.view(expert_ids_TK.shape)


@torch.no_grad()
def find_places(counts_PE: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for rows that are sorted by rank, then by expert, where they are when sorted by expert, then by rank.

    Args:
        counts_PE: int64, number of rows of each rank and expert.
        num_rows: their sum.

    Returns:
        int64 [num_rows], place in the first order of each row of the second; and the reverse.
    """
    begin_PE = (counts_PE.flatten().cumsum(0) - counts_PE.flatten()).view(counts_PE.shape)
    counts_EP = counts_PE.T.contiguous()
    begin_EP = (counts_EP.flatten().cumsum(0) - counts_EP.flatten()).view(counts_EP.shape)
    shift_PE = begin_EP.T - begin_PE
    row_R = torch.arange(num_rows, device=counts_PE.device)
    sorted_R = row_R + shift_PE.flatten().repeat_interleave(counts_PE.flatten(), output_size=num_rows)
    arrival_R = row_R - shift_PE.T.flatten().repeat_interleave(counts_EP.flatten(), output_size=num_rows)
    return arrival_R, sorted_R


class TokenDispatcher(AllToAllTokenDispatcher):
    """Sends every token to all of its experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        pass

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
        """Return the rows of this rank's experts [R, D], the rows of each expert int64 [e], and data for `combine`.

        Args:
            x_TD: this rank's tokens.
            topk_scores_TK: float32, routing weights of the chosen experts.
            topk_expert_ids_TK: int64, numbers of the chosen experts.
            num_local_tokens_per_expert_E: int64, tokens that chose each expert.
        """
        choice_N, row_TK = sort_by_expert(topk_expert_ids_TK)
        routing = Routing(
            token_R=choice_N // self.top_k,
            weight_R=topk_scores_TK.detach().flatten().index_select(0, choice_N),
            row_TK=row_TK,
            weight_TK=topk_scores_TK,
            kept_TK=None,
        )
        rows_RD = self.gather_tokens(x_TD, routing)
        if self.ep_mesh is None:
            return rows_RD, num_local_tokens_per_expert_E, DispatchMetadata(routing=routing, exchange=None)
        rows_RD, counts_e, exchange = self._exchange_to_experts(rows_RD, num_local_tokens_per_expert_E)
        return rows_RD, counts_e, DispatchMetadata(routing=routing, exchange=exchange)

    def combine(self, routed_output_RD: torch.Tensor, metadata: DispatchMetadata, x_TD: torch.Tensor) -> torch.Tensor:
        """Return for each token the sum of its experts' outputs, times the routing weights, [T, D]."""
        if metadata.exchange is not None:
            routed_output_RD = self._exchange_to_tokens(routed_output_RD, metadata.exchange)
        return self.sum_outputs(routed_output_RD, metadata.routing)

    def gather_tokens(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return the rows [R, D] that `routing` makes of the tokens x."""
        return gather_rows(x_TD, routing.token_R, routing.row_TK, routing.kept_TK)

    def sum_outputs(self, rows_RD: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return for each token the weighted sum of its rows [T, D]."""
        return sum_rows(rows_RD, routing.weight_TK, routing.row_TK, routing.token_R, routing.weight_R, routing.kept_TK)

    def _exchange_to_experts(
        self, rows_RD: torch.Tensor, counts_E: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Exchange]:
        """Send this rank's rows to the ranks of their experts.

        Returns:
            The rows of this rank's experts, sorted by expert; their numbers int64 [e]; how they came.
        """
        assert self.ep_mesh is not None
        if get_spmd_backend() == "spmd_types" and spmd.is_type_checking():
            for axis in ("dp", "cp", "tp"):  # from here on a count is this rank's own, and no part of a sum
                spmd.mutate_type(counts_E, axis, src=spmd.P, dst=spmd.V)
        with maybe_set_sparse_mesh():
            group, num_ranks = self.expert_group(), self.ep_mesh.size()
            counts_E, rows_RD = reinterpret_mesh(counts_E), reinterpret_mesh(rows_RD)
            with torch.no_grad():
                arriving_PE, sent, arriving = exchange_counts(self, counts_E, group, num_ranks)
            rows_RD = send_rows_to_experts(self, rows_RD, group, sent, arriving)
            counts_PE = arriving_PE.view(num_ranks, -1)
            arrival_R, sorted_R = find_places(counts_PE, rows_RD.shape[0])
            exchange = Exchange(sent=sent, arriving=arriving, arrival_R=arrival_R, sorted_R=sorted_R)
            return gather_rows(rows_RD, arrival_R, sorted_R.unsqueeze(1)), counts_PE.sum(0), exchange

    def _exchange_to_tokens(self, rows_RD: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """Send the experts' outputs back to the ranks of their tokens: the reverse of `_exchange_to_experts`."""
        with maybe_set_sparse_mesh():
            rows_RD = gather_rows(rows_RD, exchange.sorted_R, exchange.arrival_R.unsqueeze(1))
            rows_RD = return_rows_to_tokens(self, rows_RD, self.expert_group(), exchange.sent, exchange.arriving)
        return reinterpret_mesh(rows_RD)

    def expert_group(self) -> dist.ProcessGroup:
        """Return the process group of expert parallelism. Each of torchtitan's two backends has its own meshes."""
        if get_spmd_backend() == "spmd_types":
            return current_spmd_mesh().get_group("ep")
        assert self.ep_mesh is not None
        return self.ep_mesh.get_group()


def reinterpret_mesh(x: torch.Tensor) -> torch.Tensor:
    """Tell torchtitan's type checker that the expert-parallel and the data-parallel axes are the same ranks."""
    if get_spmd_backend() == "spmd_types" and spmd.is_type_checking():
        return spmd.reinterpret_mesh(x, spmd.current_mesh())
    return x
