"""Write a DCP checkpoint as the ranks of a sharded run do: each its own part of every tensor, and optimizer states.

python -m tests.eval.sharded_checkpoint FOLDER RENDEZVOUS
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch.distributed.tensor import Shard, distribute_tensor

from tests.eval.tiny_checkpoint import DIMS
from titan_ext.mobilemoe import model_config

RANKS = 2


def build_state() -> dict[str, torch.Tensor]:
    """Return the same random weights on every rank, by torchtitan's names."""
    torch.manual_seed(0)
    model = model_config(DIMS).build()
    model.init_states()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def save_rank(rank: int, folder: Path, rendezvous: Path) -> None:
    """Save the parts of one rank: experts cut along their input, all else along the first axis."""
    # Not by a file:// address: torch takes what follows a "#" in the path for a fragment, and opens another file.
    dist.init_process_group("gloo", store=dist.FileStore(str(rendezvous), RANKS), rank=rank, world_size=RANKS)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    state = {
        name: distribute_tensor(tensor, mesh, [Shard(2 if tensor.dim() == 3 else 0)])
        for name, tensor in build_state().items()
    }
    state |= {f"optimizer.exp_avg.{name}": tensor for name, tensor in state.items()}
    dcp.save(state, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(save_rank, (Path(sys.argv[1]), Path(sys.argv[2])), nprocs=RANKS)
