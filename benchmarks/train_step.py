"""One training step at S width, two layers, bfloat16, two threads: against transformers, against this machine's GEMM,
and what drop-and-pad, packed documents and QAT add.

    python benchmarks/train_step.py [--rounds 9] [--vocab-size 4096] [--profile] [--compile]

All variants take turns in one process, so that a busy machine slows them alike; medians over the rounds. Weights,
gradients and optimizer state are bfloat16 everywhere. The peer with the same FLOPs is Qwen2-MoE (it has a shared
expert); Qwen3-MoE has none and computes less. A small vocabulary keeps the output projection, which is the same
product everywhere, from hiding the layers; the published one is 128,256.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from titan_ext.accounting import training_flops_per_token
from titan_ext.config import FLAVORS, ModelDims, QATConfig
from titan_ext.mobilemoe import model_config
from titan_ext.qat import convert_to_qat

BATCH, SEQ_LEN = 4, 512
WARMUP_ROUNDS = 3
CATEGORIES = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("aten::_fused_adamw_",),
    "gather and scatter": ("aten::index", "aten::_index_put", "aten::scatter", "aten::gather", "aten::embedding"),
}


def titan_step(
    dims: ModelDims, positions_BL: torch.Tensor, qat: bool = False, compiled: bool = False, **options
) -> Callable[[], None]:
    """A step of the torchtitan model; `compiled` compiles every block, as torchtitan does on GPUs."""
    config = model_config(dims, **options)
    model = (convert_to_qat(config, QATConfig()) if qat else config).build()
    model.init_states()
    model.bfloat16()
    for block in model.layers.values():  # buffers that training keeps in float32
        block.moe.expert_bias_E = block.moe.expert_bias_E.float()
        if compiled:
            block.compile()
    return step_of(model, lambda tokens: model(tokens, positions=positions_BL), dims.vocab_size)


def peer_step(dims: ModelDims, config_class: type, model_class: type, **options) -> Callable[[], None]:
    """A step of a transformers model of the same dimensions."""
    config = config_class(
        vocab_size=dims.vocab_size, hidden_size=dims.d_model, num_hidden_layers=dims.n_layers,
        num_attention_heads=dims.n_heads, num_key_value_heads=dims.n_kv_heads, num_experts=dims.n_experts,
        num_experts_per_tok=dims.top_k, moe_intermediate_size=dims.expert_hidden, tie_word_embeddings=True,
        use_cache=False, **options,
    )  # fmt: skip
    model = model_class(config).bfloat16()
    return step_of(model, lambda tokens: model(tokens).logits, dims.vocab_size)


def step_of(model: torch.nn.Module, forward: Callable, vocab_size: int) -> Callable[[], None]:
    """Forward, cross entropy, backward, fused AdamW."""
    tokens_BL = torch.randint(0, vocab_size, (BATCH, SEQ_LEN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        F.cross_entropy(forward(tokens_BL).flatten(0, 1).float(), tokens_BL.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gemm() -> None:
    """A large square product: what this machine can do at best."""
    torch.mm(GEMM_A, GEMM_B)


GEMM_SIZE = 2048
GEMM_A, GEMM_B = (torch.randn(GEMM_SIZE, GEMM_SIZE).bfloat16() for _ in range(2))


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Share of one step's time by kind of work."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    found = {
        category: sum(event.self_cpu_time_total for event in events if event.key.startswith(names)) / total
        for category, names in CATEGORIES.items()
    }
    return found | {"the rest": 1 - sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--profile", action="store_true", help="also say where a step's time goes")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks; compiling takes minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    dims = dataclasses.replace(FLAVORS["S"], n_layers=2, vocab_size=arguments.vocab_size)
    whole_BL = torch.arange(SEQ_LEN).repeat(BATCH, 1)
    packed_BL = torch.arange(SEQ_LEN // 4).repeat(BATCH, 4)
    steps = {
        "gemm": gemm,
        "mobilemoe": titan_step(dims, whole_BL),
        "mobilemoe, capacity 1.5": titan_step(dims, whole_BL, capacity_factor=1.5),
        "mobilemoe, 4 documents a row": titan_step(dims, packed_BL),
        "mobilemoe, QAT": titan_step(dims, whole_BL, qat=True),
        "qwen2-moe": peer_step(
            dims, Qwen2MoeConfig, Qwen2MoeForCausalLM, shared_expert_intermediate_size=dims.shared_hidden,
            intermediate_size=dims.shared_hidden, decoder_sparse_step=1,
        ),
        "qwen3-moe": peer_step(
            dims, Qwen3MoeConfig, Qwen3MoeForCausalLM, head_dim=dims.head_dim, intermediate_size=dims.shared_hidden
        ),
    }  # fmt: skip
    if arguments.compile:
        steps["mobilemoe, compiled blocks"] = titan_step(dims, whole_BL, compiled=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUP_ROUNDS + arguments.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= WARMUP_ROUNDS:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = 2 * GEMM_SIZE**3 / seconds.pop("gemm")
    flops = training_flops_per_token(dims, SEQ_LEN) * BATCH * SEQ_LEN
    result = {
        "rounds": arguments.rounds,
        "vocab_size": arguments.vocab_size,
        "gemm_gflops": peak / 1e9,
        "tokens_per_second": {name: BATCH * SEQ_LEN / value for name, value in seconds.items()},
        "times_faster_than_qwen2_moe": statistics.median(
            peer / own for peer, own in zip(times["qwen2-moe"], times["mobilemoe"], strict=True)
        ),
        "times_faster_than_qwen3_moe": statistics.median(
            peer / own for peer, own in zip(times["qwen3-moe"], times["mobilemoe"], strict=True)
        ),
        "share_of_gemm_peak": flops / seconds["mobilemoe"] / peak,
        "cost_against_mobilemoe": {
            name: seconds[name] / seconds["mobilemoe"] for name in seconds if name.startswith("mobilemoe,")
        },
    }
    if arguments.profile:
        result["where_the_time_goes"] = shares(steps["mobilemoe"])
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
