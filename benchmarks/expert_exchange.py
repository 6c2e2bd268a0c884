"""Cost of expert parallelism's exchange: S's MoE layer over two processes, beside one process with all experts.

    python benchmarks/expert_exchange.py [--rounds 9]

Two gloo processes with one thread each route 1,024 tokens of their own through one MoE layer of S width, forward and
backward in bfloat16: `local` with all 60 experts in each process, `exchanged` with 30 experts each and the tokens
exchanged; dropless and with capacity 1.5. The variants take turns; the figures are medians of the slower rank over the
rounds. Two processes on one machine exchange through memory: a network changes the absolute cost, not the bytes.
"""

import argparse
import json
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from titan_ext.config import FLAVORS
from titan_ext.cpu.allocator import allocator_environment
from titan_ext.mobilemoe import model_config

NUM_TOKENS, WARMUP_ROUNDS, WORLD = 1024, 3, 2
VARIANTS = {"dropless": None, "capacity 1.5": 1.5}


def build_layer(capacity_factor: float | None, mesh: dist.DeviceMesh | None) -> torch.nn.Module:
    """Build one MoE layer of S; with a mesh, keep this rank's half of the experts and wire their dispatcher to it."""
    dims = FLAVORS["S"]
    config = model_config(dims, capacity_factor=capacity_factor).layers[0].moe
    torch.manual_seed(0)
    moe = config.build()
    moe.init_states()
    moe.bfloat16()
    moe.expert_bias_E = moe.expert_bias_E.float()
    if mesh is not None:
        experts = moe.routed_experts.inner_experts
        own = slice(
            mesh.get_local_rank() * dims.n_experts // WORLD, (mesh.get_local_rank() + 1) * dims.n_experts // WORLD
        )
        for name, weight in list(experts.named_parameters()):
            setattr(experts, name, torch.nn.Parameter(weight.detach()[own].clone()))
        moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return moe


def run_rank(rank: int, port: int, rounds: int, results: mp.Queue) -> None:
    """Run one rank and put its seconds of every round into `results`, by variant."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    from torchtitan.distributed import utils as dist_utils

    dist_utils.set_spmd_backend("partial_dtensor")
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,), mesh_dim_names=("ep",))["ep"]
    layers = {
        f"{name}, {place}": build_layer(factor, mesh if place == "exchanged" else None)
        for name, factor in VARIANTS.items()
        for place in ("local", "exchanged")
    }
    torch.manual_seed(rank)
    x_BLD = torch.randn(1, NUM_TOKENS, FLAVORS["S"].d_model).bfloat16().requires_grad_()
    times: dict[str, list[float]] = {name: [] for name in layers}
    for number in range(WARMUP_ROUNDS + rounds):
        for name, layer in layers.items():
            dist.barrier()
            start = time.perf_counter()
            layer(x_BLD).float().sum().backward()
            if number >= WARMUP_ROUNDS:
                times[name].append(time.perf_counter() - start)
    results.put(times)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run the ranks and print milliseconds and the cost of the exchange as a ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= allocator_environment()  # read by the processes that are started below
    results = mp.get_context("spawn").Queue()
    ranks = mp.spawn(run_rank, (port, rounds, results), nprocs=WORLD, join=False)
    found = [results.get(timeout=600) for _ in range(WORLD)]
    ranks.join()
    seconds = {name: statistics.median(map(max, *(times[name] for times in found))) for name in found[0]}
    cost = {name: seconds[f"{name}, exchanged"] / seconds[f"{name}, local"] for name in VARIANTS}
    print(
        json.dumps(
            {"rounds": rounds, "milliseconds": {n: 1000 * s for n, s in seconds.items()}, "cost": cost}, indent=2
        )
    )


if __name__ == "__main__":
    main()
