"""Time of moving tokens to experts and back, forward and backward, beside torchtitan's dispatcher (S, without experts).

    python benchmarks/dispatch.py [--rounds 7]

2,048 tokens of S's width choose 4 of 60 experts, dropless, on two threads. Both dispatchers take turns; the figures are
processor seconds, medians over the rounds, so that a busy machine disturbs them little.
"""

import argparse
import json
import statistics
import time

import torch
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from titan_ext.config import FLAVORS
from titan_ext.mobilemoe.token_dispatch import TokenDispatcher

NUM_TOKENS, WARMUP_ROUNDS = 2048, 2


def main() -> None:
    """Time both dispatchers and print milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dims, result = FLAVORS["S"], {}
    expert_ids_TK = torch.rand(NUM_TOKENS, dims.n_experts).topk(dims.top_k).indices
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=dims.n_experts)
    scores_TK = torch.rand(NUM_TOKENS, dims.top_k).requires_grad_()
    for dtype in (torch.bfloat16, torch.float32):
        x_TD = torch.randn(NUM_TOKENS, dims.d_model).to(dtype).requires_grad_()
        times: dict[str, list[float]] = {}
        for _ in range(WARMUP_ROUNDS + rounds):
            for kind in (TokenDispatcher, AllToAllTokenDispatcher):
                dispatcher = kind.Config(num_experts=dims.n_experts, top_k=dims.top_k).build()
                start = time.process_time()
                rows_RD, _, metadata = dispatcher.dispatch(x_TD, scores_TK, expert_ids_TK, counts_E)
                dispatcher.combine(rows_RD, metadata, x_TD).float().sum().backward()
                times.setdefault(kind.__name__, []).append(time.process_time() - start)
        ours, theirs = (values[WARMUP_ROUNDS:] for values in times.values())
        result[str(dtype)] = {
            "milliseconds": {name: statistics.median(values[WARMUP_ROUNDS:]) * 1e3 for name, values in times.items()},
            "time_over_torchtitan": statistics.median(one / other for one, other in zip(ours, theirs, strict=True)),
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
