"""Time of one training step at S width (two layers), beside transformers and the machine's GEMM.

The variants also show the cost of drop-and-pad (capacity), of packed documents and of QAT.

    python benchmarks/train_step.py [--rounds 9] [--vocab-size 4096] [--threads 2] [--dtype D] [--profile]
                                    [--variants NAME ...]

Every variant is a process of its own. They take turns, one step at a time, so that a busy machine slows all alike; the
figures are medians over the rounds. With one thread they are processor seconds, which a busy machine disturbs little.
Weights, gradients and optimizer state have one dtype everywhere: bfloat16, or float32 on a processor that has no
instructions for the products of bfloat16, where PyTorch emulates them at a fraction of the speed. The peer with the
same FLOPs is Qwen2-MoE (it has a shared expert); Qwen3-MoE has none and computes less. Both run as a transformers user
gets them, and once more with this project's allocator (titan_ext/cpu/allocator.py), which helps them as well. A small
vocabulary keeps the output projection, which is the same product everywhere, from hiding the layers. With the published
vocabulary, 128,256, look at `chunked loss`: it computes logits and loss for an eighth of a sequence at a time, as
training does.
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from eval.compute_dtype import has_bfloat16_products
from titan_ext.config import FLAVORS, ModelDims
from titan_ext.cpu.allocator import allocator_environment, keep_freed_memory
from titan_ext.model_stats import training_flops_per_token

BATCH, SEQ_LEN = 4, 512
WARMUP_ROUNDS = 3
GEMM_SIZE, GEMM_PRODUCTS, GEMM_SECONDS = 2048, 20, 2.0
"""Rows of a square product, and how many make a turn: fewer where they take longer, as when bfloat16 is emulated."""
PEERS = ("qwen2_moe", "qwen3_moe")
MOBILEMOE: dict[str, dict] = {
    "mobilemoe": {},
    "mobilemoe, capacity 1.5": {"capacity_factor": 1.5},
    "mobilemoe, 4 documents a row": {"documents": 4},
    "mobilemoe, QAT": {"qat": True},
    "mobilemoe, chunked loss": {"chunked": True},
    "mobilemoe, compiled blocks": {"compiled": True},
    "mobilemoe, torchtitan's dispatch": {"titans_dispatch": True},
    "mobilemoe, without tcmalloc": {},
}
"""Variant -> arguments of `make_titan_step`."""
VARIANTS = ("gemm", *MOBILEMOE, *PEERS, *(f"{name}, with our allocator" for name in PEERS))
ON_REQUEST = ("chunked loss", "torchtitan's dispatch", "compiled blocks", "without tcmalloc", "our allocator")
BY_DEFAULT = tuple(name for name in VARIANTS if not name.endswith(ON_REQUEST))
"""Variants that run by default: seven processes of up to 3.6 GB each."""
CATEGORIES = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::_softmax", "aten::_scaled_dot_product"),
    "optimizer": ("aten::_fused_adamw_",),
    "gather and scatter": ("aten::index", "aten::_index_put", "aten::scatter", "aten::gather", "aten::embedding"),
}


def make_titan_step(
    dims: ModelDims,
    dtype: torch.dtype,
    *,
    documents: int = 1,
    qat: bool = False,
    compiled: bool = False,
    chunked: bool = False,
    capacity_factor: float | None = None,
    titans_dispatch: bool = False,
) -> Callable[[], None]:
    """Build the torchtitan model and return its training step.

    Args:
        documents: number of documents in every sequence, all of one length.
        compiled: compile every block, as torchtitan does on GPUs.
        chunked: compute the loss as training does, an eighth of a sequence at a time; otherwise all logits at once.
        titans_dispatch: move tokens by torchtitan's own dispatcher, which adds with scatters.
    """
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    from titan_ext.mobilemoe import model_config  # sets the allocator: only in processes that want that
    from titan_ext.quantization.config import QuantizationConfig
    from titan_ext.quantization.qat import convert_to_qat

    config = model_config(dims, capacity_factor=capacity_factor)
    for layer in config.layers if titans_dispatch else ():
        options = {"num_experts": dims.n_experts, "top_k": dims.top_k}
        layer.moe.routed_experts.token_dispatcher = AllToAllTokenDispatcher.Config(**options)
    model = (convert_to_qat(config, QuantizationConfig()) if qat else config).build()
    model.init_states()
    model.to(dtype)
    for block in model.layers.values():  # buffers that training keeps in float32
        block.moe.expert_bias_E = block.moe.expert_bias_E.float()
        if compiled:
            block.compile()
    positions_BL = torch.arange(SEQ_LEN // documents).repeat(BATCH, documents)
    compute_loss = make_chunked_loss(model, dims.vocab_size) if chunked else cross_entropy
    return make_step(model, lambda tokens_BL: compute_loss(model(tokens_BL, positions=positions_BL), tokens_BL), dims)


def cross_entropy(logits_BLV: torch.Tensor, labels_BL: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of all logits at once, in nats a token."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten())


def make_chunked_loss(model: torch.nn.Module, vocab_size: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return a loss of the last hidden states, an eighth of every sequence at a time, and make `model` return those."""
    from torchtitan.components.loss import CrossEntropyLoss

    from titan_ext.training.head_loss import HeadLoss

    loss = HeadLoss.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=vocab_size)).build()
    loss.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    num_tokens = torch.tensor(BATCH * SEQ_LEN)
    return lambda hidden_BLD, labels_BL: loss(hidden_BLD, labels_BL, num_tokens)[0]


def make_peer_step(dims: ModelDims, dtype: torch.dtype, name: str) -> Callable[[], None]:
    """Build the transformers model `name` with the same dimensions and return its training step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        "qwen2_moe": {"shared_expert_intermediate_size": dims.shared_hidden, "decoder_sparse_step": 1},
        "qwen3_moe": {"head_dim": dims.head_dim},
    }
    config = AutoConfig.for_model(
        name, vocab_size=dims.vocab_size, hidden_size=dims.d_model, num_hidden_layers=dims.n_layers,
        num_attention_heads=dims.n_heads, num_key_value_heads=dims.n_kv_heads, num_experts=dims.n_experts,
        num_experts_per_tok=dims.top_k, moe_intermediate_size=dims.expert_hidden, intermediate_size=dims.shared_hidden,
        tie_word_embeddings=True, use_cache=False, **options[name],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    return make_step(model, lambda tokens_BL: cross_entropy(model(tokens_BL).logits, tokens_BL), dims)


def make_step(
    model: torch.nn.Module, compute_loss: Callable[[torch.Tensor], torch.Tensor], dims: ModelDims
) -> Callable[[], None]:
    """Return a step: loss of a batch of tokens, backward, fused AdamW."""
    tokens_BL = torch.randint(0, dims.vocab_size, (BATCH, SEQ_LEN))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        compute_loss(tokens_BL).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_gemm_step(dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Return a step of large square products, the fastest work of this machine, and how many they are.

    There are many of them, because the first ones wait for caches and threads.
    """
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    start = time.perf_counter()
    torch.mm(a, b)
    products = max(1, min(GEMM_PRODUCTS, round(GEMM_SECONDS / (time.perf_counter() - start))))

    def step() -> None:
        for _ in range(products):
            torch.mm(a, b)

    return step, products


def build_variant(name: str, vocab_size: int, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Return the step of the variant `name`, one of VARIANTS, and how many times it does the work."""
    dims = dataclasses.replace(FLAVORS["S"], n_layers=2, vocab_size=vocab_size)
    if name == "gemm":
        return make_gemm_step(dtype)
    if name in MOBILEMOE:
        return make_titan_step(dims, dtype, **MOBILEMOE[name]), 1
    peer, _, with_our_allocator = name.partition(", ")
    if with_our_allocator:
        keep_freed_memory()
    return make_peer_step(dims, dtype, peer), 1


def make_environment(name: str) -> dict[str, str]:
    """Return the environment variables of a variant's process."""
    plain = name in ("gemm", "mobilemoe, without tcmalloc", *PEERS)
    return os.environ | ({} if plain else allocator_environment())


class Variant:
    """A variant in a process of its own, which takes a step when asked to."""

    def __init__(self, name: str, vocab_size: int, threads: int, dtype: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--variant", name, "--vocab-size", str(vocab_size), "--threads", str(threads),
             "--dtype", dtype],
            env=make_environment(name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, question: str) -> object:
        """Return the answer to "step" (seconds), "memory" (bytes) or "profile" (share of the time by kind of work)."""
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{' '.join(self.process.args)} ended with {self.process.wait()}; -9 is the system out of memory")
        return json.loads(answer)


def serve(name: str, vocab_size: int, threads: int, dtype: str) -> None:
    """Build a variant in this process and answer the questions of `Variant` on stdin."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step, times = build_variant(name, vocab_size, getattr(torch, dtype))
    clock = time.process_time if threads == 1 else time.perf_counter
    for question in sys.stdin:
        if question == "profile\n":
            answer = profile_step(step)
        elif question == "memory\n":
            answer = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        else:
            start = clock()
            step()
            answer = (clock() - start) / times
        print(json.dumps(answer), flush=True)


def profile_step(step: Callable[[], None]) -> dict[str, float]:
    """Return the share of one step's time by kind of work."""
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
    """Time the variants and print a summary; with --variant, be the process of one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16" if has_bfloat16_products() else "float32"
    )
    parser.add_argument("--profile", action="store_true", help="also say where a step's time goes")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=BY_DEFAULT, metavar="NAME",
                        help=f"gemm, mobilemoe and any of: {'; '.join(VARIANTS[2:])}")  # fmt: skip
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        serve(arguments.variant, arguments.vocab_size, arguments.threads, arguments.dtype)
        return
    names = list(dict.fromkeys(("gemm", "mobilemoe", *arguments.variants)))  # the two that all ratios are to
    variants = {name: Variant(name, arguments.vocab_size, arguments.threads, arguments.dtype) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP_ROUNDS + arguments.rounds):
        for name, variant in variants.items():
            seconds = variant.ask("step")
            if number >= WARMUP_ROUNDS:
                times[name].append(seconds)
    result = {"dtype": arguments.dtype} | summarize(times, arguments.vocab_size)
    result["peak_resident_mb"] = {name: variant.ask("memory") / 1e6 for name, variant in variants.items()}
    if arguments.profile:
        result["share_of_time"] = variants["mobilemoe"].ask("profile")
    print(json.dumps(result, indent=2))


def summarize(times: dict[str, list[float]], vocab_size: int) -> dict[str, object]:
    """Return medians over the rounds; a ratio compares steps of the same round."""
    seconds = {name: statistics.median(values) for name, values in times.items()}
    peak = 2 * GEMM_SIZE**3 / seconds["gemm"]
    flops = training_flops_per_token(dataclasses.replace(FLAVORS["S"], n_layers=2, vocab_size=vocab_size), SEQ_LEN)
    over_mobilemoe = {
        name: statistics.median(other / own for other, own in zip(values, times["mobilemoe"], strict=True))
        for name, values in times.items()
        if name not in ("gemm", "mobilemoe")
    }
    return {
        "rounds": len(times["gemm"]),
        "vocab_size": vocab_size,
        "gemm_gflops": peak / 1e9,
        "share_of_gemm_peak": flops * BATCH * SEQ_LEN / seconds["mobilemoe"] / peak,
        "tokens_per_second": {name: BATCH * SEQ_LEN / value for name, value in seconds.items() if name != "gemm"},
        "time_over_mobilemoe": over_mobilemoe,
    }


if __name__ == "__main__":
    main()
