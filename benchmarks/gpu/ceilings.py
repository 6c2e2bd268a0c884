"""The most that this device reaches: matrix products, memory, grouped products, attention, each of them alone.

Letters: R rows of the routed experts, D model dimension, F width of an expert, E experts, B batch, L sequence.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.one_rank import DEVICE, TOY, TOY_SEQ_LEN, time_call
from titan_ext.config import FLAVORS
from titan_ext.cpu.device import IS_CPU

BATCH = {2048: 8, 8192: 2}
"""Sequence length -> sequences of a micro-batch, in the published stages."""


def measure_ceilings(save: Callable[[dict[str, Any]], None], toy: bool) -> None:
    """Measure the ceilings one after the other and save all results after each.

    Results are FLOPs a second (`*_flops`) and bytes a second (`*_bytes`).
    """
    found: dict[str, Any] = {}
    seconds = 0.05 if toy else 1.0
    for measure in (measure_matmul, measure_memory, measure_grouped, measure_router, measure_flex):
        found |= measure(seconds, toy)
        save(found)


def measure_matmul(seconds: float, toy: bool) -> dict[str, Any]:
    """Measure a large square bfloat16 product of random numbers. Zeros would draw less power and run faster."""
    size = 256 if toy else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return {"matmul_flops": 2 * size**3 / time_call(lambda: torch.mm(a, b), seconds)}


def measure_memory(seconds: float, toy: bool) -> dict[str, Any]:
    """Measure a copy, which reads and writes every byte, and a sum of two bfloat16 tensors into a third."""
    values = 1 << (20 if toy else 31)
    a, b, out = (torch.ones(values, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    return {
        "copy_bytes": 4 * values / time_call(lambda: out.copy_(a), seconds),
        "add_bytes": 6 * values / time_call(lambda: torch.add(a, b, out=out), seconds),
    }


def measure_grouped(seconds: float, toy: bool) -> dict[str, Any]:
    """Measure the experts' products of S in pre-training: forward, gradient of the rows, gradient of the weights."""
    dims = TOY if toy else FLAVORS["S"]
    tokens = 2 * TOY_SEQ_LEN if toy else 8 * 2048
    D, F, E = dims.d_model, dims.expert_hidden, dims.n_experts
    each = int(1.5 * tokens * dims.top_k / E) // 16 * 16
    R = E * each
    offsets_E = torch.arange(each, R + 1, each, device=DEVICE, dtype=torch.int32)
    x_RD = torch.randn(R, D, device=DEVICE, dtype=torch.bfloat16)
    h_RF = torch.randn(R, F, device=DEVICE, dtype=torch.bfloat16)
    w_EFD = torch.randn(E, F, D, device=DEVICE, dtype=torch.bfloat16)
    products = {
        "grouped_up": lambda: torch._grouped_mm(x_RD, w_EFD.transpose(1, 2), offs=offsets_E),
        "grouped_down": lambda: torch._grouped_mm(h_RF, w_EFD, offs=offsets_E),
        "grouped_weights": lambda: torch._grouped_mm(h_RF.t(), x_RD, offs=offsets_E),
    }
    flops = 2 * R * D * F
    return {f"{name}_flops": flops / time_call(call, seconds) for name, call in products.items()}


def measure_router(seconds: float, toy: bool) -> dict[str, Any]:
    """Measure the router's float32 product."""
    dims, T = (TOY, TOY_SEQ_LEN) if toy else (FLAVORS["S"], 8 * 2048)
    x_TD = torch.randn(T, dims.d_model, device=DEVICE)
    w_ED = torch.randn(dims.n_experts, dims.d_model, device=DEVICE)
    flops = 2 * T * dims.d_model * dims.n_experts
    return {"router_flops": flops / time_call(lambda: x_TD @ w_ED.T, seconds)}


def measure_flex(seconds: float, toy: bool) -> dict[str, Any]:
    """Measure causal flex attention at S, forward and backward; half of all pairs of positions count."""
    if IS_CPU:
        return {"flex": "not measured: flex attention has no backward pass on the CPU"}
    dims, found = FLAVORS["S"], {}
    compiled = torch.compile(flex_attention)
    for L, B in BATCH.items():
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, L, L, device=DEVICE)
        q, k, v = (
            torch.randn(B, heads, L, dims.head_dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for heads in (dims.n_heads, dims.n_kv_heads, dims.n_kv_heads)
        )

        def attend(q=q, k=k, v=v, mask=mask) -> torch.Tensor:
            return compiled(q, k, v, block_mask=mask, enable_gqa=True)

        def go_both_ways(q=q, k=k, v=v, attend=attend) -> None:
            torch.autograd.grad(attend().sum(), (q, k, v))

        forward, both = time_call(attend, seconds), time_call(go_both_ways, seconds)
        flops = 2 * B * L * L * dims.n_heads * dims.head_dim
        found |= {
            f"flex_{L}_forward_flops": flops / forward,
            f"flex_{L}_backward_flops": 2.5 * flops / (both - forward),
        }
    return found
