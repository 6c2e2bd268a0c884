"""Drop-and-pad dispatch: in training every rank sends each expert exactly `capacity` tokens (GShard, arXiv 2006.16668).

Shapes then never depend on the routing, so expert parallelism needs no counts from other ranks and no wait for the
host. An expert that was chosen by more tokens of a rank's micro-batch keeps those with the highest routing weight and
drops the rest: a dropped token gets nothing from that expert. One chosen by fewer is padded with weight 0. Outside
training nothing is dropped, so held-out losses are those of the model that is exported.

Shape suffixes: T tokens of this rank, K experts a token, E experts, e experts of this rank, C capacity, D model
dimension, R rows given to this rank's experts (e * EP * C).
"""

import math
from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.distributed as dist
from torchtitan.distributed.spmd_types import current_spmd_mesh, maybe_set_sparse_mesh
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    LocalDispatchMetadata,
    LocalTokenDispatcher,
)

from titan_ext.dtensor import local


@dataclass(frozen=True, kw_only=True)
class CapacityMetadata(LocalDispatchMetadata):
    """What `combine` needs to know of a dispatch that dropped and padded."""


class CapacityTokenDispatcher(AllToAllTokenDispatcher):
    """Sends the tokens with the highest routing weights, up to each expert's capacity; dropless while not training."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        capacity_factor: float
        """Room of an expert, in multiples of its share of perfectly balanced tokens; at least 1."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.capacity_factor = config.capacity_factor
        self.dropping = True

    def capacity(self, num_tokens: int) -> int:
        """Tokens that an expert takes of a rank's `num_tokens`."""
        return min(num_tokens, math.ceil(self.capacity_factor * num_tokens * self.top_k / self.num_experts))

    def dispatch(
        self,
        x_TD: torch.Tensor,
        topk_scores_TK: torch.Tensor,
        topk_expert_ids_TK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, LocalDispatchMetadata]:
        """The rows of this rank's experts [R, D], rows an expert int64 [e], and what `combine` needs."""
        if not self.dropping:
            return super().dispatch(x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E)
        T = x_TD.shape[0]
        C = self.capacity(T)
        chosen_ET = x_TD.new_zeros(self.num_experts, T, dtype=topk_scores_TK.dtype)
        chosen_ET = chosen_ET.scatter(0, topk_expert_ids_TK.T, topk_scores_TK.T)
        # Sigmoid scores are positive, so tokens that did not choose the expert come last, with weight 0: the padding.
        scores_EC, tokens_EC = chosen_ET.topk(C, dim=1)
        metadata = CapacityMetadata(
            token_indices_experts_sorted_N=tokens_EC.flatten(), topk_scores_experts_sorted_N=scores_EC.flatten()
        )
        rows_RD = x_TD[metadata.token_indices_experts_sorted_N]
        num_ranks = 1 if self.ep_mesh is None else self.ep_mesh.size()
        if num_ranks > 1:
            rows_RD = self._to_experts(rows_RD, num_ranks)
        counts_e = torch.full((self.num_experts // num_ranks,), num_ranks * C, dtype=torch.int64, device=x_TD.device)
        return rows_RD, counts_e, metadata

    def combine(
        self, routed_output_RD: torch.Tensor, metadata: LocalDispatchMetadata, x_TD: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the experts' rows a token [T, D]."""
        if not isinstance(metadata, CapacityMetadata):
            return super().combine(routed_output_RD, metadata, x_TD)
        if self.ep_mesh is not None and (num_ranks := self.ep_mesh.size()) > 1:
            routed_output_RD = self._from_experts(routed_output_RD, num_ranks)
        return LocalTokenDispatcher.combine(self, routed_output_RD, metadata, x_TD)

    def _to_experts(self, rows_RD: torch.Tensor, num_ranks: int) -> torch.Tensor:
        """Rows of all experts, for this rank's tokens -> rows of this rank's experts, for all ranks' tokens."""
        R, D = rows_RD.shape
        splits = [R // num_ranks] * num_ranks
        with maybe_set_sparse_mesh():
            rows_RD = self._dispatch_token_exchange(_in_current_mesh(rows_RD), self._group(), splits, splits)
            return rows_RD.view(num_ranks, self.num_experts // num_ranks, -1, D).transpose(0, 1).reshape(R, D)

    def _from_experts(self, rows_RD: torch.Tensor, num_ranks: int) -> torch.Tensor:
        """The way back."""
        R, D = rows_RD.shape
        splits = [R // num_ranks] * num_ranks
        with maybe_set_sparse_mesh():
            rows_RD = rows_RD.view(self.num_experts // num_ranks, num_ranks, -1, D).transpose(0, 1).reshape(R, D)
            rows_RD = self._combine_token_exchange(rows_RD, self._group(), splits, splits)
        return _in_current_mesh(rows_RD)

    def _group(self) -> dist.ProcessGroup:
        if get_spmd_backend() == "spmd_types":
            return current_spmd_mesh().get_group("ep")
        return self.ep_mesh.get_group()


def _in_current_mesh(rows_RD: torch.Tensor) -> torch.Tensor:
    """For torchtitan's type checker: the expert-parallel and the data-parallel axes name the same ranks."""
    if get_spmd_backend() == "spmd_types" and spmd.is_type_checking():
        return spmd.reinterpret_mesh(rows_RD, spmd.current_mesh())
    return rows_RD


class CapacityRoutedExperts(RoutedExperts):
    """Routed experts that tell their dispatcher when training ends, and count what it drops."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    def __init__(self, config: Config):
        super().__init__(config)
        # Choices dropped on this rank since the metrics were last read.
        self.register_buffer("num_dropped", torch.zeros((), dtype=torch.float32), persistent=False)

    def train(self, mode: bool = True) -> "CapacityRoutedExperts":
        self.token_dispatcher.dropping = mode
        return super().train(mode)

    def forward(
        self,
        x_BLD: torch.Tensor,
        topk_scores_BLK: torch.Tensor,
        topk_expert_ids_BLK: torch.Tensor,
        num_local_tokens_per_expert_E: torch.Tensor,
    ) -> torch.Tensor:
        if self.training:
            capacity = self.token_dispatcher.capacity(x_BLD.shape[0] * x_BLD.shape[1])
            # A count of this rank's tokens, reduced when metrics are read: outside of what the type checker follows.
            with torch.no_grad(), spmd.no_typecheck():
                local(self.num_dropped).add_((num_local_tokens_per_expert_E - capacity).clamp(min=0).sum())
        return super().forward(x_BLD, topk_scores_BLK, topk_expert_ids_BLK, num_local_tokens_per_expert_E)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.num_dropped = torch.zeros((), dtype=torch.float32, device=buffer_device or self.num_dropped.device)
