"""How long the ranks of a published size plan who writes what into a checkpoint: the first time, and every time after.

    python -m benchmarks.scale.checkpoint_plans [--model L] [--ranks 256]

Simulated: rank 0 of a fake world builds the real trainer, whose tensors are never filled. The other ranks' plans follow
from its layout, with their coordinates in its meshes and their lanes of the loader. Measured: the plan of one rank, and
rank 0's plan of all ranks, by torch's planner as titan_ext/training/checkpoints.py uses it. Not measured: the network
that gathers the plans; the size of one is printed. Without the cache every checkpoint is planned as the first one is.
Times are seconds of one core (the planner has one thread), so that other work on the machine does not count.
"""

import argparse
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.step_memory import write_data
from titan_ext.config import FLAVORS, ParallelConfig
from titan_ext.mobilemoe.model import MobileMoEModel
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.training.schedules import published_stages
from titan_ext.training.trainer import StageTrainer
from titan_ext.training.trainer_config import build_trainer_config


def build_trainer(model: str, ranks: int, folder: Path) -> StageTrainer:
    """Build rank 0's trainer of the published pre-training stage in a fake world, without initial weights."""
    from torchtitan.config.configs import CommConfig

    os.environ |= {"NGPU": str(ranks), "WORLD_SIZE": str(ranks), "RANK": "0", "LOCAL_RANK": "0"}
    write_data(folder)
    config = build_trainer_config(
        model=FLAVORS[model], stage=published_stages()["pretrain"],
        parallel=ParallelConfig(world_size=ranks, expert_parallel=4), shards=str(folder / "shards" / "pretrain"),
        heldout=None, tokenizer=str(folder / "tokenizer"), out=str(folder / "out"), seed=0,
        quantization=QuantizationConfig(),
    )  # fmt: skip
    config.comm = CommConfig(mode="fake_backend")
    config.checkpoint.async_mode = "disabled"  # its process group of its own is no fake one
    with patch.object(MobileMoEModel, "init_weights", lambda self, **options: None):
        return config.build()


SAMPLED = 8
"""Number of ranks whose later plans are made."""


class FakeRanks:
    """The state that each rank would save, made of rank 0's: its coordinates, and its lanes of the loader."""

    def __init__(self, trainer: StageTrainer, ranks: int):
        self.trainer, self.ranks = trainer, ranks
        self.state = {
            key: value.state_dict() if hasattr(value, "state_dict") else value
            for key, value in trainer.checkpointer._flattened_model_states_sd().items()
        }
        self._is_first = True
        self._coordinates: dict[tuple[int, int], tuple[int, ...]] = {}

    def make_plan(self, rank: int) -> tuple[DefaultSavePlanner, SavePlan, float]:
        """Return a rank's planner, the plan that it would send, and the seconds of one core that it took."""
        loader: Any = self.trainer.dataloader
        loader._dp_rank = rank
        loader._rewind()
        state = self.state | {"dataloader": loader.state_dict()}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = f"rank {rank}"  # the ranks of this process have caches of their own
        with patch.object(DeviceMesh, "_sym_get_coordinate", self._find_coordinate(rank)):
            begin = time.process_time()
            planner.set_up_planner(state, is_coordinator=rank == 0)
            plan = planner.create_local_plan()
            return planner, plan, time.process_time() - begin

    def _find_coordinate(self, rank: int) -> Callable[[DeviceMesh, int], int]:
        def find(mesh: DeviceMesh, index: int) -> int:
            key = (id(mesh), rank)
            if key not in self._coordinates:
                (place,) = (mesh.mesh == rank).nonzero().tolist()
                self._coordinates[key] = tuple(place)
            return self._coordinates[key][index]

        return find

    def plan_all(self) -> dict[str, float]:
        """Let all ranks plan, then rank 0 for all. Return parts, seconds of one rank and of rank 0, and bytes sent."""
        # Once every rank has made its plan, a few are looked at for all: nothing has changed, so they send nothing.
        asked = range(self.ranks) if self._is_first else range(0, self.ranks, self.ranks // SAMPLED)
        made = [self.make_plan(rank) for rank in asked]
        plans = [plan for _, plan, _ in made]
        assert self._is_first or not any(plan.usable for plan in plans), "a plan has changed"
        plans += [SavePlan([], usable=False)] * (self.ranks - len(plans))
        self._is_first = False
        begin = time.process_time()
        final, _ = made[0][0].create_global_plan(plans)
        seconds = time.process_time() - begin
        for (planner, _, _), plan in zip(made, final, strict=False):
            assert planner.finish_plan(plan).items, "every rank knows what it writes"
        return {
            "items": sum(len(plan.items) for plan in plans),
            "own": statistics.median(took for _, _, took in made),
            "all": seconds,
            "bytes": len(pickle.dumps(plans[1])),
        }


def main() -> None:
    """Print one row for each of three checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="L", choices=sorted(FLAVORS))
    parser.add_argument("--ranks", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = FakeRanks(build_trainer(arguments.model, arguments.ranks, Path(folder)), arguments.ranks)
    print(f"{arguments.model} on {arguments.ranks} ranks\n")
    print("| checkpoint | parts sent | one rank's own plan, s | rank 0's of all, s | bytes a rank sends |")
    print("|---|--:|--:|--:|--:|")
    for name in ("first", "second", "third"):
        row = world.plan_all()
        print(f"| {name} | {row['items']:,} | {row['own']:.3f} | {row['all']:.3f} | {row['bytes']:,} |", flush=True)


if __name__ == "__main__":
    main()
