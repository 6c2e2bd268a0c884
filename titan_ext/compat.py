"""Private interfaces of torch, torchtitan and streaming that titan_ext uses. No other file of titan_ext imports them.

Each has a test in tests/titan_ext/test_model_contracts.py or test_loader_contracts.py that names what breaks when a
new version changes it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_gather_tensor, all_gather_tensor_autograd

if TYPE_CHECKING:
    from streaming import Stream
    from streaming.base.format.mds import MDSReader
    from torchtitan.models.common.moe import GroupedExperts
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

__all__ = [
    "all_gather_tensor",
    "all_gather_tensor_autograd",
    "download_file",
    "load_shard_readers",
    "multiply_grouped",
    "return_rows_to_tokens",
    "send_rows_to_experts",
]


def send_rows_to_experts(
    dispatcher: "AllToAllTokenDispatcher", rows_RD: torch.Tensor, group: dist.ProcessGroup, splits: list[int]
) -> torch.Tensor:
    """Exchange rows over the expert-parallel group: `splits[i]` rows go to rank i, and as many come from it.

    torchtitan's dispatcher offers its exchange only together with an exchange of the counts.
    """
    return dispatcher._dispatch_token_exchange(rows_RD, group, splits, splits)


def return_rows_to_tokens(
    dispatcher: "AllToAllTokenDispatcher", rows_RD: torch.Tensor, group: dist.ProcessGroup, splits: list[int]
) -> torch.Tensor:
    """Exchange the experts' outputs back: the reverse of `send_rows_to_experts`."""
    return dispatcher._combine_token_exchange(rows_RD, group, splits, splits)


def multiply_grouped(
    experts: "GroupedExperts", a_RK: torch.Tensor, b_EKN: torch.Tensor, offsets_E: torch.Tensor
) -> torch.Tensor:
    """Multiply each expert's rows of `a_RK` with its own matrix, and return [R, N].

    Expert e has the rows from offsets_E[e - 1] (0 for the first expert) to offsets_E[e].
    """
    return experts._grouped_mm(A=a_RK, B_t=b_EKN, offs=offsets_E)


def load_shard_readers(stream: "Stream") -> "list[MDSReader]":
    """Return a reader for every shard that the index.json in the stream's local folder lists.

    streaming offers the readers only to a StreamingDataset, which keeps its state in shared memory.
    """
    from streaming.base.world import World  # here, because other users of this module do not need streaming

    # A world of one process: the index is in place, so streaming has no other process to wait for.
    world = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
    return stream.get_shards(world, allow_unsafe_types=False)


def download_file(address: str, path: Path) -> None:
    """Download one file from any address that streaming understands (s3://, gs://, hf://, ...).

    Raises:
        Exception: of a type of the store's client, where the file is missing or the store is out of reach.
    """
    from streaming.base.storage import CloudDownloader

    CloudDownloader.direct_download(address, str(path))
