"""Training on this device against float64 on the CPU: loss, gradients, expert loads; repeatability; QAT's bits.

Weights and tokens are drawn on the CPU from fixed seeds, so every device gets the same ones. bfloat16 rounds, and a
rounding can send a token to another expert, so errors have no small bound that is known beforehand. The same training
on the CPU, in another process that sees no GPU, says which errors bfloat16 makes anyway.
"""

import dataclasses
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.attention.flex_attention import flex_attention
from torchtitan.models.common.attention import FlexAttention
from torchtitan.trainer import Trainer

from benchmarks.gpu.one_rank import (
    DEVICE,
    TOY,
    TOY_SEQ_LEN,
    Training,
    build_trainer_on,
    close,
    describe_training,
)
from benchmarks.gpu.reference import Options, Reference
from eval.export.dimensions import int4_layout
from eval.export.int4 import quantize_tensor
from eval.hf_mobilemoe.checkpoint_mobilemoe import PackedTensor, dequantize_int4
from titan_ext.config import FLAVORS
from titan_ext.cpu.device import IS_CPU
from titan_ext.dtensor import local
from titan_ext.quantization.config import QuantizationConfig
from titan_ext.quantization.qat import fake_quantize_weight
from titan_ext.quantization.shards import group_weight, round_groups
from titan_ext.training.trainer import StageTrainer

CASES: dict[str, dict[str, Any]] = {
    "float32, dropless": {"precision": "float32"},
    "float32, capacity 1.5": {"precision": "float32", "capacity_factor": 1.5},
    "bfloat16, capacity 1.5": {"capacity_factor": 1.5},
    "bfloat16, dropless": {},
    "bfloat16, QAT": {"quantize": True},
}
WIDTH_S = dataclasses.replace(FLAVORS["S"], n_layers=2, vocab_size=4096)
GROUP_SIZE = QuantizationConfig().group_size


def check_training(save: Callable[[dict[str, Any]], None], folder: Path, toy: bool) -> None:
    """Compare all cases and save after each. A case that fails does not stop the others.

    Raises:
        RuntimeError: a case failed; its traceback is saved.
    """
    dims, seq_len = (TOY, TOY_SEQ_LEN) if toy else (WIDTH_S, 256)
    found: dict[str, Any] = {}
    # torchtitan tries many configurations of the kernel where the blocks are not compiled, which takes minutes.
    FlexAttention._compiled_flex_attn = torch.compile(flex_attention)
    for number, (name, changes) in enumerate(CASES.items()):
        # The compiler refuses grouped products in float32, and for the CPU it takes longer than it saves.
        compile = not IS_CPU and changes.get("precision") != "float32"
        training = describe_training(
            dims, seq_len=seq_len, local_batch_size=2, micro_batches=1, compile=compile,
            activation_checkpoint="selective", **changes,
        )  # fmt: skip
        try:
            found[name] = compare_with_reference(training, folder / str(number))
        except Exception:  # whatever a kernel or a compiler raises is a result; the end of this function raises
            found[name] = {"traceback": traceback.format_exc()}
            print(found[name]["traceback"], file=sys.stderr)
            if dist.is_initialized():
                dist.destroy_process_group()
        save(found)
    failed = [name for name, result in found.items() if "traceback" in result]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found)} cases failed: {'; '.join(failed)}")


def compare_with_reference(training: Training, folder: Path) -> dict[str, Any]:
    """Return the errors of one micro-batch, and whether a second pass over it gives the same bits."""
    dims, stage = training.dims, training.stage
    trainer = build_trainer_on(training, folder, (stage.seq_len // 8, stage.seq_len))
    weights = draw_weights(trainer)
    inputs, labels = next(iter(trainer.dataloader))
    options = Options(
        stage.capacity_factor, stage.quantize, GROUP_SIZE, stage.router_z_loss,
        getattr(torch, training.parallel.precision),
    )  # fmt: skip
    reference = Reference(weights, dims, options)
    expected, differentiated = reference.compute_loss(inputs["input"], inputs["positions"], labels)
    differentiated.backward()
    loss, gradients, loads = go_both_ways(trainer, inputs, labels)
    second_loss, second_gradients, _ = go_both_ways(trainer, inputs, labels)
    close(trainer)
    errors = {
        name: relative_error(gradient.double(), weights[name].grad.double()) for name, gradient in gradients.items()
    }
    changed = [name for name, gradient in gradients.items() if not torch.equal(gradient, second_gradients[name])]
    worst = max(errors, key=lambda name: errors[name])
    return {
        "loss": loss,
        "float64_loss": expected.item(),
        "loss_error": abs(loss - expected.item()) / expected.item(),
        "gradient_error": max(errors.values()),
        "gradient_of": worst,
        "gradient_errors": errors,
        "tokens_routed_otherwise": sum(
            abs(load - other) for layer, others in zip(loads, reference.loads, strict=True)
            for load, other in zip(layer, others, strict=True)
        ) / 2,
        "choices": sum(map(sum, reference.loads)),
        "repeatable": loss == second_loss and not changed,
        "changed_gradients": changed,
    }  # fmt: skip


def draw_weights(trainer: StageTrainer) -> dict[str, torch.Tensor]:
    """Set the trainer's weights to numbers drawn on the CPU, and return them as float32 leaves by name."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, parameter in list_parameters(trainer):
        drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if "norm" in name else 0.02)
        weights[name] = (1 + drawn if "norm" in name else drawn).requires_grad_()
        with torch.no_grad():
            local(parameter).copy_(weights[name])
    return weights


def list_parameters(trainer: StageTrainer) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters by the name that they have without wrappers; the tied output projection is left out."""
    parameters = {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
        for name, parameter in trainer.model_parts[0].named_parameters()
    }
    return [(name, parameter) for name, parameter in parameters.items() if name != "lm_head.weight"]


def go_both_ways(
    trainer: StageTrainer, inputs: dict[str, torch.Tensor], labels: torch.Tensor
) -> tuple[float, dict[str, torch.Tensor], list[list[int]]]:
    """Return loss, gradients on the CPU by name, and the tokens of each expert in each layer, of one micro-batch."""
    trainer.optimizers.zero_grad()
    counters = [block.moe.tokens_per_expert_E for block in trainer.model_parts[0].layers.values()]
    for counter in counters:
        local(counter).zero_()
    loss = Trainer.forward_backward_step(
        trainer,
        input_dict={name: value.to(DEVICE) for name, value in inputs.items()},
        labels=labels.to(DEVICE),
        global_valid_tokens=(labels != -100).sum().to(DEVICE),
    )
    gradients = {name: local(parameter.grad).cpu().clone() for name, parameter in list_parameters(trainer)}
    num_choices = labels.numel() * trainer.model_config.layers[0].moe.router.top_k
    loads = []
    for counter in counters:
        counts_E = local(counter).cpu().double()
        passes = counts_E.sum() / num_choices  # recomputation may count every token twice
        loads.append((counts_E / passes).long().tolist())
    return loss.item(), gradients, loads


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    return float((found - expected).norm() / expected.norm())


def check_qat_bits(save: Callable[[dict[str, Any]], None], toy: bool) -> None:
    """Compare the weights that training computes with on this device with those that the exporter stores.

    The weights are the head and a layer's experts of S in both groupings, as bfloat16 and as float32; rounded eager and
    compiled where they are computed with, and compiled as shards, as in a training step. The number of values that
    differ in any bit is saved after each.
    """
    dims = TOY if toy else WIDTH_S
    compiled, compiled_shards = (
        torch.compile(function, backend="aot_eager" if IS_CPU else "inductor", dynamic=False)
        for function in (fake_quantize_weight, round_groups)
    )

    def round_shard(weight: torch.Tensor, group_size: int, axis: int) -> torch.Tensor:
        groups = group_weight(weight.float(), axis % weight.dim(), group_size)
        return compiled_shards(groups, weight.dtype).view(weight.shape)

    kinds = {
        "head": ("model.embed_tokens.weight", (dims.vocab_size, dims.d_model), "in"),
        "experts, in": (DOWN, (dims.n_experts, dims.d_model, dims.expert_hidden), "in"),
        "experts, out": (DOWN, (dims.n_experts, dims.d_model, dims.expert_hidden), "out"),
    }
    found: dict[str, Any] = {}
    for kind, (name, shape, grouped) in kinds.items():
        axis = -1 if grouped == "in" else -2
        for dtype in (torch.bfloat16, torch.float32):
            weight = draw_hard_weights(shape, dtype, axis)
            stored = export_and_read(name, weight, grouped)
            for way, function in (("eager", fake_quantize_weight), ("compiled", compiled), ("shards", round_shard)):
                trained = function(weight.to(DEVICE), GROUP_SIZE, axis).cpu()
                different = int((trained != stored.to(dtype)).sum())
                found[f"{kind}, {dtype}, {way}"] = {"values": weight.numel(), "different": different}
            save(found)


DOWN = "model.layers.0.feed_forward.experts.down_proj"


def export_and_read(name: str, weight: torch.Tensor, grouped: Literal["in", "out"]) -> torch.Tensor:
    """Return, in float32, what an INT4 export of a weight in training's layout stands for.

    Experts are [E, out, in] in training and [E, in, out] in an export.
    """
    exported = weight.transpose(1, 2).contiguous() if weight.dim() == 3 else weight
    packed = PackedTensor(name, tuple(exported.shape), int4_layout(QuantizationConfig(expert_group_axis=grouped)))
    q, scale = quantize_tensor(exported, packed)
    stored = dequantize_int4(q, scale, packed.dim, packed.group_size)
    return stored.transpose(1, 2) if weight.dim() == 3 else stored


def draw_hard_weights(shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> torch.Tensor:
    """Return random weights, some of them halfway between values of the grid, groups of zeros and of tiny numbers.

    Args:
        axis: axis along which weights are grouped.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).transpose(axis, -1).contiguous() * 0.02
    rows = weight.view(-1, weight.shape[-1])
    rows[::7] *= 2.0 ** torch.randint(-30, 3, (len(rows[::7]), 1), generator=generator)
    rows[3::11] = 0
    rows[5::13] = torch.randint(-15, 16, rows[5::13].shape, generator=generator) / 2 * 0.0123
    return weight.transpose(axis, -1).contiguous().to(dtype)
