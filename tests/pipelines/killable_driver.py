"""A driver with a gang that trains for ever; says `training` once both ranks do. Killed by test_ray."""

import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipelines.ray.cluster import Cluster
from pipelines.recipe import ClusterConfig


def train_for_ever(run: Path) -> None:
    """all_reduce without end, as a rank in the middle of a stage does."""
    dist.init_process_group("gloo")
    while True:
        dist.all_reduce(torch.ones(1000))
        (run / f"alive{dist.get_rank()}").touch()


def main(run: Path) -> None:
    """Start the gang in a thread, as the command does, and wait to be killed."""
    with Cluster(ClusterConfig(), run, world_size=2) as cluster:
        threading.Thread(
            target=cluster.run_gang, args=(train_for_ever, run), kwargs={"name": "gang"}, daemon=True
        ).start()
        while not all((run / f"alive{rank}").exists() for rank in (0, 1)):
            time.sleep(0.1)
        print("training", flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
