"""One MoE layer of flavor S: ExecuTorch's stock op beside our op's kernels, 1 and 64 tokens, 1 and 2 threads.

    python benchmarks/expert_op.py [--rounds 20]

Prints JSON: median milliseconds of a call and how many times faster than the stock op ours is; each
round takes them in another order, because the stock op leaves the next one a cold cache. Every call gets new tokens.
"""

import argparse
import json
import random
import statistics
import time

import torch

from eval.compat import register_executorch_ops, set_executorch_threads
from eval.device import expert_op
from eval.device.expert_blobs import pack_blobs, pack_stock_blobs
from titan_ext.config import FLAVORS


def random_blobs(n_experts: int, rows: int, k: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same random matrices in our layout and in the stock op's."""
    q = torch.randint(-8, 8, (n_experts, rows, k), dtype=torch.int8)
    scales = torch.full((n_experts, rows, k // group_size), 2.0**-8)
    return pack_blobs(q, scales), pack_stock_blobs(q, scales)


def calls(group_size: int):
    """Name -> call of (x_TD), over one layer's weights."""
    s = FLAVORS["S"]
    gate, bias = 0.02 * torch.randn(s.n_experts, s.d_model), torch.zeros(s.n_experts)
    w13, stock_w13 = random_blobs(s.n_experts, 2 * s.expert_hidden, s.d_model, group_size)
    w2, stock_w2 = random_blobs(s.n_experts, s.d_model, s.expert_hidden, group_size)
    sizes = (s.top_k, s.n_experts, s.expert_hidden, s.d_model, group_size, 4, "sigmoid", s.route_scale)
    found = {"stock": lambda x: torch.ops.llama.quantized_moe_ffn(x, gate, bias, stock_w13, stock_w2, *sizes)}
    for kernel in expert_op.list_kernels():
        found[kernel] = lambda x, kernel=kernel: expert_op.run_kernel(
            kernel, x, gate, bias, w13, w2, top_k=s.top_k, expert_hidden=s.expert_hidden, group_size=group_size,
            route_scale=s.route_scale,
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    register_executorch_ops()
    result = {}
    for group_size in (32, 64, 128):
        found = calls(group_size)
        for threads in (1, 2):
            set_executorch_threads(threads)
            for n_tokens in (1, 64):
                times: dict[str, list[float]] = {name: [] for name in found}
                for _ in range(rounds):
                    for name in random.sample(list(found), len(found)):
                        call, x = found[name], torch.randn(n_tokens, FLAVORS["S"].d_model)
                        start = time.perf_counter()
                        call(x)
                        times[name].append(time.perf_counter() - start)
                ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
                faster = {name: ms["stock"] / value for name, value in ms.items() if name != "stock"}
                key = f"group {group_size}, {threads} threads, {n_tokens} tokens"
                result[key] = {"milliseconds": ms, "times_faster_than_stock": faster}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
