"""A training loop in plain PyTorch and float64: clipping, AdamW, schedule, expert bias, z-loss, accumulation.

Written from arXiv 2605.27358, arXiv 2408.15664, arXiv 1711.05101 and docs/titan_ext.md. Of titan_ext it has the values
of a stage alone. The model's forward pass is benchmarks/gpu/reference.py, which shares no code with titan_ext either.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from benchmarks.gpu.reference import Options, Reference
from titan_ext.config import ModelDims, StageConfig

BETA1, EPSILON = 0.9, 1e-8
GROUP_SIZE = 32


@dataclass(frozen=True)
class Variant:
    """The parts of a loop for which a stage has no option. Tests change one to see that such a fault is noticed."""

    bias_sign: float = 1.0
    """-1 would give the experts with many tokens more."""
    centred_bias: bool = True
    decayed_norms: bool = True
    mean_of_means: bool = False
    """Whether every micro-batch's loss is a mean of its own."""


@dataclass(frozen=True)
class Step:
    """The numbers that a step leaves behind."""

    loss: float
    """Mean cross entropy over the targets of the global batch, nats."""
    grad_norm: float
    """Before clipping."""
    lr: float
    router_z: float
    """Mean over tokens of the squared logsumexp of the router's logits, summed over the layers."""
    loads: list[list[int]]
    """Tokens that chose each expert, by layer."""
    biases: list[list[float]]
    """Expert bias after the update, by layer."""


def draw_weights(dims: ModelDims, seed: int) -> dict[str, torch.Tensor]:
    """Return weights in float64 by torchtitan's name, and expert biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    D, E, F, H = dims.d_model, dims.n_experts, dims.expert_hidden, dims.head_dim

    def draw(*shape: int, std: float = 0.1, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = {"tok_embeddings.weight": draw(dims.vocab_size, D, std=0.3), "norm.weight": draw(D, mean=1.0)}
    for layer in range(dims.n_layers):
        shapes = {
            "attention.qkv_linear.wq": (dims.n_heads * H, D), "attention.qkv_linear.wk": (dims.n_kv_heads * H, D),
            "attention.qkv_linear.wv": (dims.n_kv_heads * H, D), "attention.wo": (D, dims.n_heads * H),
            "moe.router.gate": (E, D), "moe.shared_experts.w1": (dims.shared_hidden, D),
            "moe.shared_experts.w2": (D, dims.shared_hidden), "moe.shared_experts.w3": (dims.shared_hidden, D),
        }  # fmt: skip
        of_layer = {f"{name}.weight": draw(*shape) for name, shape in shapes.items()}
        experts = {"w1_EFD": (E, F, D), "w2_EDF": (E, D, F), "w3_EFD": (E, F, D)}
        of_layer |= {f"moe.routed_experts.inner_experts.{name}": draw(*shape) for name, shape in experts.items()}
        of_layer |= {f"{name}.weight": draw(D, mean=1.0) for name in ("attention_norm", "ffn_norm")}
        of_layer["moe.expert_bias_E"] = draw(E, std=0.02)
        weights |= {f"layers.{layer}.{name}": tensor for name, tensor in of_layer.items()}
    return weights


def compute_rate(stage: StageConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1: warm-up, plateau, decay.

    A warm-up of W steps reaches the height in step W. The decay begins one step later than it is counted, so that the
    rate would reach its minimum one step after the last (torchtitan's convention).
    """
    if step <= stage.warmup_steps:
        return stage.learning_rate * step / stage.warmup_steps
    is_whole = stage.decay_fraction == 1
    decay = stage.steps - stage.warmup_steps if is_whole else round(stage.steps * stage.decay_fraction)
    done = max(0, step - 1 - (stage.steps - decay)) / decay
    share = 1 - done if stage.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return stage.learning_rate * (stage.min_lr_factor + (1 - stage.min_lr_factor) * share)


def train(
    weights: dict[str, torch.Tensor],
    dims: ModelDims,
    stage: StageConfig,
    batches: Iterable[torch.Tensor],
    variant: Variant = Variant(),
) -> Iterator[Step]:
    """Train `weights` in place, and yield what each step leaves behind.

    Args:
        batches: global batches as `tests.titan_ext.reference_batches.read_batches` yields them.
    """
    biases = [weights[f"layers.{layer}.moe.expert_bias_E"] for layer in range(dims.n_layers)]
    leaves = {name: tensor.requires_grad_() for name, tensor in weights.items() if "expert_bias" not in name}
    moments = {name: (torch.zeros_like(leaf), torch.zeros_like(leaf)) for name, leaf in leaves.items()}
    for step, batch_GL3 in enumerate(islice(batches, stage.steps), 1):
        loss, z_mean, loads_LE = differentiate(weights, dims, stage, batch_GL3, variant)
        norm = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves.values()))
        clip = min(1.0, stage.max_grad_norm / (norm + 1e-6))
        rate = compute_rate(stage, step)
        for bias_E, load_E in zip(biases, loads_LE, strict=True):
            delta_E = variant.bias_sign * stage.expert_bias_update_rate * (load_E.mean() - load_E).sign()
            bias_E += delta_E - (delta_E.mean() if variant.centred_bias else 0)
        for name, leaf in leaves.items():
            decay = 0.0 if "norm" in name and not variant.decayed_norms else stage.weight_decay
            update(leaf, leaf.grad * clip, moments[name], step, rate, decay, stage.beta2)
            leaf.grad = None
        yield Step(loss, norm, rate, z_mean, loads_LE.long().tolist(), [bias_E.tolist() for bias_E in biases])


def differentiate(
    weights: dict[str, torch.Tensor], dims: ModelDims, stage: StageConfig, batch_GL3: torch.Tensor, variant: Variant
) -> tuple[float, float, torch.Tensor]:
    """Add the gradients of a global batch. Return its loss, its router z, and the loads float64 [layers, E]."""
    options = Options(stage.capacity_factor, stage.quantize, GROUP_SIZE, stage.router_z_loss, torch.float64)
    micro_batches = batch_GL3.split(stage.local_batch_size)
    loss = z_mean = 0.0
    loads_LE = torch.zeros(dims.n_layers, dims.n_experts, dtype=torch.float64)
    for micro_BL3 in micro_batches:
        reference = Reference(weights, dims, options)
        entropy, z_squares = reference.compute_sums(*micro_BL3.unbind(-1))
        counted = micro_BL3.repeat(len(micro_batches), 1, 1) if variant.mean_of_means else batch_GL3
        entropy, z_squares = entropy / (counted[..., 2] != -100).sum(), z_squares / batch_GL3[..., 0].numel()
        (entropy + stage.router_z_loss * z_squares).backward()
        loss, z_mean = loss + entropy.item(), z_mean + z_squares.item()
        loads_LE += torch.tensor(reference.loads)
    return loss, z_mean, loads_LE


@torch.no_grad()
def update(
    leaf: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    step: int,
    rate: float,
    decay: float,
    beta2: float,
) -> None:
    """Make one step of AdamW: the decay is apart from the moments (arXiv 1711.05101, algorithm 2)."""
    first, second = moments
    first.mul_(BETA1).add_((1 - BETA1) * gradient)
    second.mul_(beta2).add_((1 - beta2) * gradient * gradient)
    leaf *= 1 - rate * decay
    leaf -= rate * (first / (1 - BETA1**step)) / ((second / (1 - beta2**step)).sqrt() + EPSILON)
